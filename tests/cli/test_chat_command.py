"""`chat` on a terminal, on one that cannot be drawn on, and in a pipe."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion import convert
from terminals import Terminal
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(scope="module")
def folder(source_cache: Callable[..., Path], tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("chat") / "out"
    base = source_cache("llama", max_position_embeddings=8192)
    convert(base, out, "bd3lm", generation={"max_new_tokens": 12})
    return out


def piped(folder: Path, *options: str, given: str | bytes) -> Any:
    return CliRunner().invoke(app, ["chat", str(folder), *options], input=given)


def test_in_a_pipe_lines_are_questions_and_stdout_has_the_answers(folder: Path) -> None:
    result = piped(folder, given="Hello\n\n/undo\nHello\nAnd\\\nyou?\n")
    assert result.exit_code == 0, result.stderr
    document = json.loads(piped(folder, "--json", given="Hello\nAnd\\\nyou?\n").stdout)
    said = [turn["content"] for turn in document["turns"]]
    assert (said[0], said[2]) == ("Hello", "And\nyou?")
    assert result.stdout == f"{said[1]}\n{said[1]}\n{said[3]}\n"
    assert "nothing is recorded of it" in result.stderr
    assert result.stderr.count("tokens per forward") == 3
    assert ">>>" not in result.output
    quiet = piped(folder, "--quiet", given="Hello\n")
    assert (quiet.stdout, quiet.stderr) == (f"{said[1]}\n", "")


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ("/nonsense\n", 2, "there is no /nonsense"),
        (b"\xff\n", 1, "not UTF-8"),
        ("", 0, ""),
    ],
)
def test_a_script_sees_a_failure(folder: Path, given: str | bytes, code: int, words: str) -> None:
    result = piped(folder, given=given)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("content", [None, "", '{"messages": []}\n{"messages": []}\n', "[]", "{}"])
def test_what_no_chat_saved_is_refused_as_that(
    folder: Path, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "said.jsonl"
    if content is not None:
        file.write_text(content)
    result = piped(folder, "--load", str(file), given="Hello\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "said.jsonl" in result.stderr
    assert result.stderr.endswith(". Give a file that /save wrote\n")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--block-length", "8"], 2, "--block-length"),
        (["--lossless"], 1, "says nothing of the base"),
        (["--lossless", "--verify-with", "self"], 2, "clean tokens"),
        (["--base", "nowhere"], 2, "add --lossless"),
        (["--lossless", "--base", "nowhere"], 1, "give a local folder"),
        (["--load", "nowhere.json"], 1, "nowhere.json"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, options: list[str], code: int, words: str) -> None:
    result = piped(folder, *options, given="Hello\n")
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_without_a_template_there_is_nobody_to_talk_with(
    source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    convert(source_cache("mistral"), tmp_path / "out", "bd3lm")
    result = piped(tmp_path / "out", given="Hello\n")
    assert result.exit_code == 3
    assert "no chat template" in result.stderr
    assert "dllm-convert sample" in result.stderr


def test_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    child = Terminal("chat", str(folder))
    child.read_until(b">>> ")
    answer = child.type("Hello\n", b"per forward")
    assert "▒" in answer, "shown while it is denoised"
    assert "1049h" not in answer, "what was said before stays"
    assert "Did you mean /threshold?" in child.type("/treshold 1\n", b"mean /threshold?")
    assert "/threshold 0.5" in child.type("/threshold 0.5\n", b"/threshold 0.5\r\n>>> ")
    assert "blocks of its own" in child.type("/block-length 8\n", b"own")
    # Ctrl-C gives an answer up, and leaves the chat as it was.
    child.type("/max-new-tokens 6000\n", b"/max-new-tokens 6000\r\n>>> ")
    child.type("Go on\n", b"of 6000 tokens")
    os.write(child.master, b"\x03")
    child.type("", b"taken back")
    child.wait_for_prompt(b">>> ")
    child.type("/max-new-tokens 8\n", b"/max-new-tokens 8\r\n>>> ")
    file = tmp_path / "talk.json"
    child.type(f"/save {file}\n", b"saved in")
    child.wait_for_prompt(b">>> ")
    os.write(child.master, b"\x04")
    assert child.close() == 0, child.written
    assert len(json.loads(file.read_text())["turns"]) == 2
    on = piped(folder, "--load", str(file), "--json", given="And?\n")
    assert len(json.loads(on.stdout)["turns"]) == 4


@pytest.mark.slow
def test_sigterm_ends_a_chat_in_the_middle_of_an_answer(folder: Path) -> None:
    child = Terminal("chat", str(folder), "--max-new-tokens", "6000")
    child.read_until(b">>> ")
    child.type("Go on\n", b"of 6000 tokens")
    child.process.terminate()
    assert child.close() == 130
    assert b"error: interrupted" in child.written


@pytest.mark.slow
def test_on_a_terminal_that_cannot_be_drawn_on(folder: Path) -> None:
    child = Terminal("chat", str(folder), term="dumb")
    child.read_until(b">>> ")
    expected = piped(folder, "--quiet", given="Hello\n").stdout
    answer = child.type("Hello\n", b"per forward")
    child.wait_for_prompt(b">>> ")
    os.write(child.master, b"\x04")
    assert child.close() == 0
    assert "\x1b" not in child.written.decode()
    shown = expected.split("\n")[0].strip()
    assert shown[:8] in answer


def test_another_model_verifies_the_answers(
    folder: Path, source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    """By the option and by the command; a conversation that was saved so goes on so."""
    base = source_cache("llama", max_position_embeddings=8192)
    right = dc.sample(folder, "Hello", chat=True, lossless=True, base=base, max_new_tokens=12)
    plain = dc.sample(folder, "Hello", chat=True, max_new_tokens=12)
    assert plain.text != right.text
    named = ("--lossless", "--base", str(base))
    document = json.loads(piped(folder, *named, "--json", given="Hello\n").stdout)
    assert document["turns"][1]["content"] == right.text
    facts = document["turns"][1]["facts"]
    assert 0 < facts["verifier_forwards"] <= facts["forwards"]
    assert document["settings"]["verify_with"] == "base"
    saved = tmp_path / "said.json"
    given = f"/lossless off\nHello\n/undo\n/lossless on\nHello\n/save {saved}\n"
    result = piped(folder, *named, given=given)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{plain.text}\n{right.text}\n"
    assert result.stderr.count("forwards were its own") == 1
    # The folder's manifest says nothing of a base, so that it has to be named again.
    refused = piped(folder, "--load", str(saved), given="/regen\n")
    assert refused.exit_code == 1 and "says nothing of the base" in refused.stderr
    talk = dc.Chat.from_dict(json.loads(saved.read_text()), "saved")
    again = dc.reply(folder, talk.reopen(), base=base)
    assert again.turns[-1].content == right.text
