"""What is downloaded of a published checkpoint is all that a folder of one is read for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from conversion import convert
from gated import gated_folder
from hub_server import LoopbackHub, run_python, serve

SCRIPT = """
import json, sys
from pathlib import Path
from dllm_convert.common.console import Reporter
from dllm_convert.source.checkpoints import local_checkpoint
folder = local_checkpoint("me/tiny", None, Reporter(quiet=True))
files = (path for path in folder.rglob("*") if path.is_file())
print(json.dumps(sorted(path.relative_to(folder).as_posix() for path in files)))
"""
NOISE: dict[str, Any] = {
    "kernel": "neighbours",
    "neighbours": 4,
    "jumps": 2.0,
    "discrete_steps": 8,
    "schedule": "cosine",
}


@pytest.mark.parametrize("kind", ["plain", "neighbours", "gated"])
def test_a_snapshot_has_all_files(kind: str, tmp_path: Path, source_cache: SourceFactory) -> None:
    made, source = tmp_path / "made", source_cache("qwen3")
    if kind == "gated":
        gated_folder(source, made)
    else:
        convert(source, made, "bd3lm", **({"noise": NOISE} if kind == "neighbours" else {}))
    here = sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file())
    assert any(name.endswith(".npy") for name in here) == (kind == "neighbours")
    with serve(LoopbackHub(repos={"me/tiny": made})) as hub:
        modules = ["dllm_convert.source.checkpoints"]
        found = run_python(SCRIPT, env=hub.environment(tmp_path / "home"), modules=modules)
    assert json.loads(found.splitlines()[-1]) == here
