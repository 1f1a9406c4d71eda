"""The published modelling file is one file that needs torch and transformers only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from dllm_convert.adapters import all_adapters
from dllm_convert.modeling.bundle import modeling_source, write_modeling
from dllm_convert.modeling.published import modeling


def test_it_imports_nothing_but_torch_and_transformers() -> None:
    tree = ast.parse(modeling_source())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(str(node.module).split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers", "packaging"}


def test_no_two_parts_define_the_same_name() -> None:
    names = [
        node.name
        for node in ast.parse(modeling_source()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    assert len(names) == len(set(names))
    assert {adapter.diffusion_class for adapter in all_adapters()} <= set(names)


def test_it_refuses_a_transformers_that_would_run_causal(tmp_path: Path) -> None:
    path = write_modeling(tmp_path)
    code = (
        "import runpy, sys, transformers; from transformers import LlamaForCausalLM; "
        "sys.modules['transformers'].__version__ = '5.1.0'; "
        f"runpy.run_path({str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"it needs at least {modeling.MIN_TRANSFORMERS}" in done.stderr
