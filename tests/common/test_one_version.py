"""A manifest of another version is refused by every command that reads it, in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pushing import checkpoint
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.manifest import MANIFEST_FILE, hash_files, read_manifest
from dllm_convert.errors import DataError

COMMANDS: dict[str, tuple[str, ...]] = {
    "card": ("card",),
    "sample": ("sample", "--max-new-tokens", "4"),
    "evaluate": ("evaluate", "--data", "pydoc"),
    "push": ("push",),
}


@pytest.fixture(scope="module")
def original(source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(source_cache("llama"), tmp_path_factory.mktemp("version") / "checkpoint")


@pytest.fixture
def of_version(original: Path, tmp_path: Path) -> Callable[[Any], Path]:
    def make(version: Any) -> Path:
        folder = Path(shutil.copytree(original, tmp_path / "checkpoint"))
        manifest = json.loads((folder / MANIFEST_FILE).read_text()) | {"format_version": version}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
        return folder

    return make


@pytest.mark.parametrize("version", [99, 0, True, None, "1", [1], {}, 1.5])
def test_another_version_is_not_read(of_version: Callable[[Any], Path], version: Any) -> None:
    folder = of_version(version)
    with pytest.raises(DataError, match=r"format_version is .*, expected 1"):
        read_manifest(folder)
    assert read_manifest(folder, any_version=True)["format_version"] == version


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_it_and_changes_nothing(
    of_version: Callable[[Any], Path], command: tuple[str, ...]
) -> None:
    folder = of_version(99)
    before = hash_files(folder)
    name, *options = command
    more = ("me/tiny",) if name == "push" else ()
    done = CliRunner().invoke(app, [name, str(folder), *more, *options])
    assert done.exit_code == 1, done.output
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "format_version is 99, expected 1" in line
    assert hash_files(folder) == before
