"""A check of a large repository on the Hub downloads kilobytes of its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from giant import LLAMA_70B, SHARDS, write_giant
from hub_server import COMMIT, LoopbackHub, run_python, serve
from hub_store import MAIN, Blob, Commit, Repo

from dllm_convert.planning.conversion import make_plan, plan_as_dict
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.safetensors_header import INDEX_FILE

REPO = "someone/llama-70b"
CHECK = """
import json, sys
from dllm_convert.cli.app import app
from dllm_convert.errors import DllmConvertError
app(["check", sys.argv[1], "--to", "bd3lm", "--block", "32", "--json"], standalone_mode=False)
"""


def publish(hub: LoopbackHub, folder: Path) -> None:
    """Put a folder of holes on the Hub; to hash 140 GB of zeros would take minutes."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            name = path.stem.ljust(64, "0")[:64].encode().hex()[:64]
            blob = Blob(path, path.stat().st_size, name[:40], name, lfs=True)
            hub.store.objects[name] = blob
        else:
            blob = Blob.of(path)
        files[path.name] = blob
    commit = Commit(COMMIT, None, files, "initial commit", "somebody")
    hub.store.repos[REPO] = Repo(False, {MAIN: COMMIT}, {COMMIT: commit})


@pytest.fixture
def giant(tmp_path: Path, source_cache: Callable[..., Path]) -> Path:
    folder = tmp_path / "giant"
    folder.mkdir()
    for path in source_cache("llama").iterdir():
        if "token" in path.name:
            shutil.copy(path, folder / path.name)
    write_giant(folder, LLAMA_70B)
    return folder


@pytest.fixture
def hub(giant: Path) -> Iterator[LoopbackHub]:
    with serve(LoopbackHub()) as running:
        publish(running, giant)
        yield running


def check(hub: LoopbackHub, home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_python(CHECK, REPO, env=hub.environment(home)))
    return found


def weight_requests(hub: LoopbackHub) -> list[str]:
    return [r for r in hub.requests if r.startswith("GET /lfs/")]


def test_a_check_of_70b_reads_kilobytes(hub: LoopbackHub, giant: Path, tmp_path: Path) -> None:
    found = check(hub, tmp_path / "home")
    small = sum(p.stat().st_size for p in giant.iterdir() if p.suffix != ".safetensors")
    assert hub.bytes_sent - small < 30_000, "headers, and what the Hub's API says"
    assert small < 200_000
    assert len(weight_requests(hub)) <= 4
    local = make_plan(Recipe(source="x", target="bd3lm", block_size=32), inspect_source(str(giant)))
    told, seen = plan_as_dict(local), found
    for key in ("attention_layers", "mask", "writes", "tensors_changed", "min_transformers"):
        assert seen[key] == told[key]
    assert seen["source"]["parts"] == told["source"]["parts"]
    assert seen["source"]["parts"]["total"] == 70_553_706_496
    assert len(seen["source"]["weight_files"]) == SHARDS
    assert seen["source"]["gated"] == "no"


@pytest.mark.parametrize("how", ["no total", "wrong total"])
def test_headers_are_all_read_where_the_index_does_not_prove_the_shapes(
    hub: LoopbackHub, giant: Path, tmp_path: Path, how: str
) -> None:
    index = json.loads((giant / INDEX_FILE).read_text())
    if how == "no total":
        del index["metadata"]
    else:
        index["metadata"]["total_size"] += 2
    (giant / INDEX_FILE).write_text(json.dumps(index))
    publish(hub, giant)
    found = check(hub, tmp_path / "home")
    assert len(weight_requests(hub)) == SHARDS
    assert found["source"]["parts"]["total"] == 70_553_706_496
    small = sum(p.stat().st_size for p in giant.iterdir() if p.suffix != ".safetensors")
    assert hub.bytes_sent - small < 150_000


def test_a_shard_that_lacks_what_the_index_says_is_an_error(
    hub: LoopbackHub, giant: Path, tmp_path: Path
) -> None:
    index = json.loads((giant / INDEX_FILE).read_text())
    index["weight_map"]["model.layers.3.self_attn.extra.weight"] = index["weight_map"][
        "model.layers.3.self_attn.q_proj.weight"
    ]
    (giant / INDEX_FILE).write_text(json.dumps(index))
    publish(hub, giant)
    code = CHECK.replace("app(", "try:\n    app(", 1) + (
        "except DllmConvertError as error:\n    print(json.dumps(str(error)))\n"
    )
    told = run_python(code, REPO, env=hub.environment(tmp_path / "home"))
    assert "disagree about 'model.layers.3.self_attn.extra.weight'" in told


def test_a_truncated_shard_and_a_huge_header_are_errors(
    hub: LoopbackHub, giant: Path, tmp_path: Path
) -> None:
    code = CHECK.replace("app(", "try:\n    app(", 1) + (
        "except DllmConvertError as error:\n    print(json.dumps(str(error)))\n"
    )
    shard = min(giant.glob("*.safetensors"))
    with shard.open("r+b") as out:
        out.truncate(10_000_000)
    publish(hub, giant)
    told = run_python(code, REPO, env=hub.environment(tmp_path / "home"))
    assert "truncated" in told
    with shard.open("r+b") as out:
        out.write((1 << 60).to_bytes(8, "little"))
    told = run_python(code, REPO, env=hub.environment(tmp_path / "home2"))
    assert f"a header of {1 << 60} bytes" in told
    assert hub.bytes_sent < 1_000_000
