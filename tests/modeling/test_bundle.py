"""The published code: files that travel together, and need torch and transformers only."""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import forks
import pytest
from conversion import convert
from generic import make_generic, measured

from dllm_convert.adapters import all_adapters
from dllm_convert.adapters.base import Adapter
from dllm_convert.modeling import published
from dllm_convert.modeling.bundle import CODE_FILES, MODELING_FILE, published_code, write_code
from dllm_convert.modeling.published import modeling

OTHERS = sorted(set(CODE_FILES) - {MODELING_FILE})


@pytest.fixture(scope="module", params=["written", "measured"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family with a class in the published code, and one whose class is added to it."""
    if request.param == "written":
        return None
    adapter = measured(make_generic(tmp_path_factory.mktemp("generic") / "olmo2", "olmo2")).adapter
    assert adapter is not None
    return adapter


def trees(family: Adapter | None) -> dict[str, ast.Module]:
    return {name: ast.parse(text) for name, text in published_code(family).items()}


def test_they_import_nothing_but_torch_and_transformers(family: Adapter | None) -> None:
    for tree in trees(family).values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = {str(node.module).split(".")[0]}
            else:
                continue
            assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers", "packaging"}


RELATIVE = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)
"""What transformers takes for the name of a file that travels along."""


def test_the_modelling_file_names_every_other(family: Adapter | None) -> None:
    """Older releases of transformers copy what it names, and nothing that those name."""
    code = published_code(family)
    assert sorted(set(RELATIVE.findall(code[MODELING_FILE]))) == [name[:-3] for name in OTHERS]
    for tree in trees(family).values():
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        assert all(node in tree.body and f"{node.module}.py" in OTHERS for node in relative)


def test_every_module_is_in_one_file() -> None:
    held = [part for parts in CODE_FILES.values() for part in parts] + ["measured.py"]
    there = {path.name for path in Path(str(published.__file__)).parent.glob("*.py")}
    assert sorted(held) == sorted(there - {"__init__.py"})


def test_no_file_defines_a_name_twice(family: Adapter | None) -> None:
    found = []
    for name, tree in trees(family).items():
        names = [
            *(n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)),
            *(ast.unparse(n.targets[0]) for n in tree.body if isinstance(n, ast.Assign)),
        ]
        assert len(names) == len(set(names)), name
        found += names
    assert {adapter.diffusion_class for adapter in all_adapters()} <= set(found)
    assert family is None or family.diffusion_class in found


def load(folder: Path) -> dict[str, ModuleType]:
    """Import what was written into a folder, as a package of its own."""
    package = f"published_in_{folder.name}"
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return {name: importlib.import_module(f"{package}.{name[:-3]}") for name in CODE_FILES}


def globals_read(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from globals_read(inner)


def test_every_name_that_is_read_is_there(family: Adapter | None, tmp_path: Path) -> None:
    """A name that a module imported from one in another file is imported from that file."""
    write_code(tmp_path, family)
    for name, module in load(tmp_path).items():
        code = compile((tmp_path / name).read_text(), name, "exec")
        classes = {n.name for n in ast.walk(ast.parse((tmp_path / name).read_text()))
                   if isinstance(n, ast.ClassDef)}  # fmt: skip
        inside = {attribute for c in classes for attribute in vars(getattr(module, c))}
        known = set(vars(module)) | set(vars(builtins)) | inside
        assert set(globals_read(code)) <= known, name


def test_they_use_nothing_private_of_torch(family: Adapter | None) -> None:
    private = re.compile(r"torch\.(ops|_\w+)|\._(buffers|parameters|modules|forward_\w+|C)\b")
    for name, text in published_code(family).items():
        assert private.findall(text) == [], name


def test_a_person_can_read_them(family: Adapter | None) -> None:
    for name, text in published_code(family).items():
        lines = text.splitlines()
        assert len(lines) <= 1000, name
        assert max(map(len, lines)) <= 100, name


def test_they_refuse_a_transformers_that_would_run_causal(
    family: Adapter | None, tmp_path: Path
) -> None:
    folder = tmp_path / "published_here"
    folder.mkdir()
    write_code(folder, family)
    code = (
        "import sys, transformers; from transformers import LlamaForCausalLM; "
        "sys.modules['transformers'].__version__ = '5.1.0'; import published_here.modeling_dllm"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    minimum = modeling.MIN_TRANSFORMERS if family is None else family.min_transformers
    assert done.returncode != 0
    assert f"it needs at least {minimum}" in done.stderr


STRANGER = """
import json, os, sys
sys.modules["dllm_convert"] = None
import torch
from transformers import AutoModelForCausalLM
folder, again = sys.argv[1:]
os.chdir(folder)
found = []
for name in (folder, folder + "/", "."):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    ids = torch.arange(6, 14)[None]
    found.append(model.generate(ids, max_new_tokens=8)[0].tolist())
model.save_pretrained(again)
saved = sorted(name for name in os.listdir(again) if name.endswith(".py"))
os.chdir("/")
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
found.append(model.generate(ids, max_new_tokens=8)[0].tolist())
print(json.dumps([type(model).__name__, saved, found]))
"""


def test_they_travel_together(source_cache: Callable[..., Path], tmp_path: Path) -> None:
    """Out of a folder however it is named, and with a model that is saved again."""
    folder = tmp_path / "out"
    convert(source_cache("llama"), folder, "bd3lm")
    done = forks.run(
        [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "again")],
        modules=forks.STRANGER,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    name, saved, found = json.loads(done.stdout.splitlines()[-1])
    assert name == "DiffusionLlamaForCausalLM"
    assert saved == sorted(CODE_FILES)
    assert all(row == found[0] for row in found)
