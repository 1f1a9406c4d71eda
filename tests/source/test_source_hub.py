"""A Hub id is read through kilobytes at one commit, and every refusal says what to do next."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, LoopbackHub, run_python, serve

from dllm_convert.source.inspect import inspect_source

INSPECT = """
import json, sys
from dllm_convert.errors import DllmConvertError
from dllm_convert.source.inspect import inspect_source
try:
    info = inspect_source(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
except DllmConvertError as error:
    print(json.dumps({"error": type(error).__name__, "code": error.exit_code, "text": str(error)}))
else:
    print(json.dumps({
        "kind": info.kind, "revision": info.revision, "license": info.license,
        "path": info.path and str(info.path),
        "tensors": {n: [t.dtype, t.shape, t.file] for n, t in info.tensors.items()},
        "files": info.files, "vocab": info.tokenizer.size, "warnings": info.warnings,
    }))
    if len(sys.argv) > 3:
        from dllm_convert.common.console import Reporter
        from dllm_convert.source.materialise import materialise
        print(materialise(info, Reporter(quiet=True)).folder)
"""


@pytest.fixture
def hub(source_factory: Callable[..., Path]) -> Iterator[LoopbackHub]:
    repos = {
        "someone/tiny-llama": source_factory("llama", shards=2),
        "someone/tiny-bert": source_factory("bert"),
        "someone/gated-llama": source_factory("llama"),
    }
    with serve(LoopbackHub(repos=repos, gated={"someone/gated-llama"})) as running:
        yield running


def inspect(hub: LoopbackHub, home: Path, *arguments: str, **env: str) -> dict[str, Any]:
    output = run_python(INSPECT, *arguments, env={**hub.environment(home), **env})
    result: dict[str, Any] = json.loads(output.splitlines()[0])
    return result


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bert"])
def test_a_hub_id_gives_what_the_folder_gives(hub: LoopbackHub, tmp_path: Path, name: str) -> None:
    found = inspect(hub, tmp_path / "home", f"someone/{name}")
    local = inspect_source(str(hub.repos[f"someone/{name}"]))
    assert (found["kind"], found["revision"], found["path"]) == ("hub", COMMIT, None)
    assert found["license"] == "apache-2.0"
    assert found["vocab"] == local.tokenizer.size
    assert set(found["files"]) == set(local.files)
    assert found["tensors"] == {
        n: [t.dtype, list(t.shape), t.file] for n, t in local.tensors.items()
    }


def test_planning_downloads_no_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    inspect(hub, tmp_path / "home", "someone/tiny-llama")
    whole = [r for r in hub.requests if r.startswith("GET") and r.endswith(".safetensors")]
    cached = list((tmp_path / "home").rglob("*.safetensors"))
    assert not cached
    assert len(whole) <= 4, "headers are read by ranged requests only"


def test_materialise_downloads_the_files_of_the_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path / "home")
    folder = Path(run_python(INSPECT, "someone/tiny-llama", COMMIT, "yes", env=env).splitlines()[1])
    original = hub.repos["someone/tiny-llama"]
    for path in original.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_terms_of_the_base_come_along(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = hub.repos["someone/tiny-llama"]
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: x-terms\nlicense_link: LICENSE\nlanguage: [en]\n---\n"
    )
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE", "Notice.txt"):
        (folder / name).write_text("terms")
    code = INSPECT.replace('"kind": info.kind', '"card": vars(info.card), "kind": info.kind')
    env = hub.environment(tmp_path / "home")
    first, local = run_python(code, "someone/tiny-llama", COMMIT, "yes", env=env).splitlines()
    found = json.loads(first)
    assert found["card"] == {
        **{"license": "other", "license_name": "x-terms", "license_link": "LICENSE"},
        **{"languages": ["en"], "origin": None},
    }
    wanted = {"LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", "Notice.txt"}
    assert wanted <= set(found["files"])
    assert wanted <= {path.name for path in Path(local).iterdir()}


def test_the_cache_serves_when_the_hub_is_gone(hub: LoopbackHub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path / "home")
    run_python(INSPECT, "someone/tiny-llama", "main", "yes", env=env)
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = inspect(hub, tmp_path / "home", "someone/tiny-llama", COMMIT, **offline)
    assert found["revision"] == COMMIT
    assert "local cache" in found["warnings"][0]


@pytest.mark.parametrize("name", ["qwen2.5-1.5", "Qwen/Qwen2.5-1.5"])
def test_unknown_id_suggests_the_nearest_recipe(
    hub: LoopbackHub, tmp_path: Path, name: str
) -> None:
    found = inspect(hub, tmp_path / "home", name)
    assert (found["error"], found["code"]) == ("HubError", 1)
    assert "Did you mean the recipe 'qwen2.5-1.5b'?" in found["text"]


def test_unknown_id_that_resembles_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    found = inspect(hub, tmp_path / "home", "someone/nothing")
    assert (found["error"], found["code"]) == ("HubError", 1)
    assert "someone/nothing is not on the Hub" in found["text"]
    assert "hf auth login" in found["text"]


def test_gated_repository_says_where_to_ask(hub: LoopbackHub, tmp_path: Path) -> None:
    found = inspect(hub, tmp_path / "home", "someone/gated-llama")
    assert found["error"] == "HubError"
    assert "gated" in found["text"]
    assert "huggingface.co/someone/gated-llama" in found["text"]


def test_unknown_revision_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    found = inspect(hub, tmp_path / "home", "someone/tiny-llama", "no-such-branch")
    assert found["error"] == "HubError"
    assert "no-such-branch" in found["text"]


def test_bad_token_is_refused_without_printing_it(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.bad_token = True
    found = inspect(hub, tmp_path / "home", "someone/tiny-llama", HF_TOKEN="hf_verysecret")
    assert found["error"] == "HubError"
    assert "HF_TOKEN" in found["text"]
    assert "verysecret" not in found["text"]


@pytest.mark.parametrize(
    "env",
    [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}],
    ids=["refused", "offline"],
)
def test_no_network_is_one_line(hub: LoopbackHub, tmp_path: Path, env: dict[str, str]) -> None:
    found = inspect(hub, tmp_path / "home", "someone/tiny-llama", **env)
    assert found["error"] == "HubError"
    assert "cannot reach the Hub" in found["text"]
    assert "\n" not in found["text"]


def test_repository_without_config_or_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    (hub.repos["someone/tiny-bert"] / "model.safetensors").unlink()
    found = inspect(hub, tmp_path / "home", "someone/tiny-bert")
    assert found["error"] == "DataError"
    assert "model.safetensors" in found["text"]
    (hub.repos["someone/tiny-bert"] / "config.json").unlink()
    assert "config.json" in inspect(hub, tmp_path / "home", "someone/tiny-bert")["text"]
