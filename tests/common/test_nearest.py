"""A path that is not there: what may have been meant, in every command that takes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.nearest import nearest_place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with folders to be misspelt, made the current one."""
    for name in ("out/llama-bd3lm", "out/qwen-mdlm", "Models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out/note.txt").touch()
    (tmp_path / "smol.Q4_1.gguf").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("out/llama-bd3ml", "out/llama-bd3lm"),
        ("otu/llama-bd3lm", "out/llama-bd3lm"),
        ("otu/lama-bd3lm", "out/llama-bd3lm"),
        ("./out/qwen-mdln/", "out/qwen-mdlm"),
        ("models", "Models"),
        ("smol.Q4_0.gguf", "smol.Q4_1.gguf"),
        ("out/note.tx", None),  # a file is no checkpoint
        ("out/llama-bd3lm/deeper", None),
        ("somebody/something", None),
        ("out/note.txt/llama", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_what_is_spelt_most_alike(
    here: Path, typed: str, meant: str | None, absolute: bool
) -> None:
    if not absolute:
        assert nearest_place(typed) == (Path(meant) if meant else None)
    elif typed:
        assert nearest_place(here / typed) == (here / meant if meant else None)


@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("check",),
        ("verify",),
        ("verify", "--files"),
        ("verify", "--json"),
        ("sample",),
        ("card",),
        ("evaluate", "--data", "pydoc"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("here")
def test_every_command_names_it(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "out/llama-bd3ml"])
    assert result.exit_code == 1, result.stderr
    text = " ".join(result.stderr.splitlines())
    assert "Did you mean out/llama-bd3lm?" in text
    assert "Traceback" not in text
    if "--json" in command:
        assert "llama-bd3lm" in json.loads(result.stdout)["error"]["hint"]


@pytest.mark.usefixtures("here")
def test_where_nothing_is_near_both_places_are_named() -> None:
    result = CliRunner().invoke(app, ["verify", "somebody/something"])
    assert result.exit_code == 1
    assert "somebody/something, which is no folder here and not in the local cache" in result.stderr
    assert "Did you mean" not in result.stderr
    assert "HF_HUB_OFFLINE" in result.stderr


@pytest.mark.usefixtures("here")
def test_push_and_a_single_word() -> None:
    pushed = CliRunner().invoke(app, ["push", "out/llama-bd3ml", "me/name"])
    assert (pushed.exit_code, "Did you mean out/llama-bd3lm?" in pushed.stderr) == (1, True)
    checked = CliRunner().invoke(app, ["check", "modles"])
    assert (checked.exit_code, "nearest: Models" in checked.stderr) == (2, True)


@pytest.mark.parametrize("command", ["sample", "card", "verify"])
def test_a_file_is_told_with_its_folder(here: Path, command: str) -> None:
    (here / "out/llama-bd3lm/config.json").write_text("{}")
    result = CliRunner().invoke(app, [command, "out/llama-bd3lm/config.json", "--json"])
    error = json.loads(result.stdout)["error"]
    assert "is not a folder" in error["message"]
    assert error["hint"].endswith("such as out/llama-bd3lm")


@pytest.mark.parametrize("command", ["sample", "card", "verify"])
@pytest.mark.usefixtures("here")
def test_no_hint_leads_to_where_nothing_is(command: str) -> None:
    """Beside the file is no checkpoint; and the file itself is not what was meant."""
    result = CliRunner().invoke(app, [command, "out/note.txt", "--json"])
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["message"]) == (1, "out/note.txt is not a folder")
    assert error["hint"] == "Give the folder that dllm-convert run wrote"
