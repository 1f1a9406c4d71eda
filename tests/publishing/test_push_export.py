"""An export goes to a repository of its own, or to a revision of its conversion's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SourceFactory
from hub_server import LoopbackHub, serve
from pushing import TOKEN, Done, checkpoint, command

import dllm_convert as dc
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.json_files import write_config
from dllm_convert.common.manifest import (
    EXPORT_FILE,
    MANIFEST_FILE,
    checkpoint_files,
    read_manifest,
    write_manifest,
)
from dllm_convert.errors import DataError
from dllm_convert.serving import dangers
from dllm_convert.serving.run import export

REPO, CONVERSION = "me/tiny-a2d", "me/tiny"


@pytest.fixture(scope="module")
def conversion(source_cache: SourceFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(source_cache("llama"), tmp_path_factory.mktemp("of") / "tiny")


@pytest.fixture(scope="module")
def original(conversion: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for bound in ("MASK_BOUND", "ROWS_BOUND"):  # nobody trained this one
            patch.setattr(dangers, bound, 1.0)
        return export(conversion, "a2d").path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny-a2d"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(tmp_path / "hub")
    hub.add_user("me", TOKEN)
    with serve(hub):
        yield hub


@pytest.fixture
def push(hub: LoopbackHub, folder: Path, tmp_path: Path) -> Callable[..., Done]:
    def run(*arguments: str, repo_id: str = REPO, of: Path | None = None) -> Done:
        return command(hub, tmp_path / "home", "push", str(of or folder), repo_id, *arguments)

    return run


def held(hub: LoopbackHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    commit = hub.store.repos[repo_id].find(revision)
    assert commit is not None
    return {name: blob.read() for name, blob in commit.files.items() if name != ".gitattributes"}


def metadata(files: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    return found


def record(folder: Path, **changes: Any) -> None:
    known = json.loads((folder / EXPORT_FILE).read_text())
    write_config(folder / EXPORT_FILE, known | changes)


def refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_repository_of_its_own_names_the_conversion(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    done = push("--base-model", CONVERSION, "--json")
    assert done.code == 0, done.stderr
    assert done.json["confirmed"]["files"] == len(checkpoint_files(folder))
    files = held(hub, REPO)
    assert set(files) == set(checkpoint_files(folder))
    said = metadata(files)
    assert said["base_model"] == CONVERSION
    assert "base_model_relation" not in said
    assert said["license"] == "apache-2.0"
    assert {"a2d", "dllm"} <= set(said["tags"])
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "## Start" in files["README.md"].decode()
    assert json.loads(files[EXPORT_FILE])["base_model"] == CONVERSION

    again = push("--base-model", CONVERSION, "--json")
    assert again.json["uploaded"] == []


def test_a_quantisation_says_that_it_is_one(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    # Its millions of bytes may spell anything: they are compared, not read.
    whole = folder / "tiny.gguf"
    whole.write_bytes(b"GGUF" + TOKEN.encode() + bytes(range(256)))
    files = json.loads((folder / EXPORT_FILE).read_text())["files"]
    for outtype, relation in (("Q8_0", "quantized"), ("Q4_K_M", "quantized"), ("F16", None)):
        record(folder, outtype=outtype, files=files | {whole.name: sha256_file(whole)})
        repo_id = f"me/tiny-{outtype}"
        done = push("--base-model", CONVERSION, repo_id=repo_id)
        assert done.code == 0, done.stderr
        published = held(hub, repo_id)
        assert metadata(published).get("base_model_relation") == relation
        assert published[whole.name] == whole.read_bytes()


def test_a_revision_of_the_conversion_holds_the_export_alone(
    hub: LoopbackHub, conversion: Path, folder: Path, push: Callable[..., Done]
) -> None:
    first = push(repo_id=CONVERSION, of=conversion)
    assert first.code == 0, first.stderr
    before = held(hub, CONVERSION)
    done = push("--revision", "dllm", repo_id=CONVERSION)
    assert done.code == 0, done.stderr
    files = held(hub, CONVERSION, "dllm")
    assert set(files) == set(checkpoint_files(folder))
    assert metadata(files)["base_model"] == CONVERSION
    assert held(hub, CONVERSION) == before
    refused(push("--base-model", CONVERSION, repo_id=CONVERSION), 1, "Give another repository")
    assert held(hub, CONVERSION) == before
    # The next export of the same conversion takes the place of this one.
    assert push("--revision", "dllm", "--json", repo_id=CONVERSION).json["uploaded"] == []


def test_what_is_missing_changed_or_not_said_is_refused(
    hub: LoopbackHub, conversion: Path, folder: Path, push: Callable[..., Done]
) -> None:
    refused(push(), 2, "Give --base-model")
    refused(push("--base-model", "not a name"), 2, "expected namespace/name")
    refused(push("--adapter-only", "--base-model", CONVERSION), 2, "is for conversions")
    refused(push("--base-model", CONVERSION, of=conversion), 2, "is for exports")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace("a2d-llama", "llama"))
    refused(push("--base-model", CONVERSION), 1, "config.json", "was changed")
    config.write_text(text)
    (folder / "secret.bin").write_text("x")
    refused(push("--base-model", CONVERSION), 1, "secret.bin")
    (folder / "secret.bin").unlink()
    source = json.loads((folder / EXPORT_FILE).read_text())["source"]
    record(folder, source=source | {"verified": False})
    refused(push("--base-model", CONVERSION), 4, "was not verified when it was exported")
    assert not hub.store.repos
    assert push("--base-model", CONVERSION, "--force-unverified").code == 0


DAMAGE: dict[str, Any] = {
    "files": {"config.json": "short"},
    "engines": "dLLM",
    "target": None,
    "source": {"name": "tiny", "language": "en"},
    "card": [],
}


@pytest.mark.parametrize("key", DAMAGE)
def test_a_record_that_export_did_not_write_is_refused(
    key: str, folder: Path, tmp_path: Path
) -> None:
    record(folder, **{key: DAMAGE[key]})
    with pytest.raises(DataError, match=rf"dllm_export\.json: {key} is not what"):
        dc.push(folder, REPO, base_model=CONVERSION)
    (folder / EXPORT_FILE).write_text("[")
    with pytest.raises(DataError):
        dc.push(folder, REPO, base_model=CONVERSION)


def test_an_export_remembers_whether_its_conversion_was_verified(
    conversion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("MASK_BOUND", "ROWS_BOUND"):
        monkeypatch.setattr(dangers, bound, 1.0)
    other = Path(shutil.copytree(conversion, tmp_path / "other"))
    write_manifest(other, read_manifest(other) | {"verification": None})
    known = json.loads((export(other, "a2d").path / EXPORT_FILE).read_text())["source"]
    assert known["verified"] is False
    assert known["license"] == "apache-2.0"
    (other / MANIFEST_FILE).unlink()
    bare = export(other, "a2d", tmp_path / "bare").path
    assert "verified" not in json.loads((bare / EXPORT_FILE).read_text())["source"]
