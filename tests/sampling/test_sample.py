"""The command on tiny checkpoints: prompts, chats and recordings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion import converted_once, sample
from PIL import Image
from typer.testing import CliRunner

from dllm_convert.cli.app import app

CASES = {"llama": "bd3lm", "qwen3": "bd3lm", "bert": "mdlm", "roberta": "mdlm"}


@pytest.fixture(scope="module")
def checkpoint(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    return converted_once(source_cache, tmp_path_factory.mktemp, CASES)


@pytest.mark.parametrize("family", list(CASES))
def test_recording_changes_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder, film = checkpoint(family), tmp_path / "film.gif"
    plain = json.loads(sample(folder, "--json").stdout)
    recorded = json.loads(sample(folder, "--json", "--record", str(film)).stdout)
    watched = sample(folder, "--watch")
    timeless = {"seconds": 0}
    assert plain | timeless == recorded | timeless
    assert watched.stdout.rstrip("\n") == (plain["prompt"] + plain["text"]).rstrip("\n")
    assert "\x1b" not in watched.stderr
    image: Any = Image.open(film)
    # One token per forward, those behind the end of a text that are written before it too.
    written = plain["forwards"] if family == "bert" else plain["new_tokens"]
    assert image.n_frames == written + 1
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]


def test_prompts_of_different_lengths_are_written_as_if_alone(
    checkpoint: Callable[[str], Path],
) -> None:
    prompts = ("A name", "The block in which a name is bound is the one that", "If")
    folder = checkpoint("llama")
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    together = json.loads(sample(folder, *given, "--json").stdout)
    alone = [json.loads(sample(folder, "--prompt", p, "--json").stdout) for p in prompts]
    keys = ("prompt", "text", "new_tokens")
    assert [[s[k] for k in keys] for s in together] == [[s[k] for k in keys] for s in alone]
    assert sample(folder, *given).stdout.count("\n---\n") == 2


def test_a_chat_is_put_into_the_template(checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    from dllm_convert.sampling.prompts import encode_prompt

    folder = checkpoint("llama")
    ids = encode_prompt(AutoTokenizer.from_pretrained(folder), "Why?", chat=True)
    shown = AutoTokenizer.from_pretrained(folder).decode(ids)
    assert shown == "<|start|>user\nWhy?<|end|>\n<|start|>assistant\n"
    reply = json.loads(sample(folder, "--prompt", "Why?", "--chat", "--json").stdout)
    assert sample(folder, "--prompt", "Why?", "--chat").stdout == reply["text"].rstrip("\n") + "\n"


def test_a_tokenizer_without_a_template_has_no_chats(checkpoint: Callable[[str], Path]) -> None:
    result = sample(checkpoint("qwen3"), "--chat", code=3)
    assert "error: the tokenizer has no chat template. Leave out --chat" in result.stderr


def test_a_page_is_titled_after_the_checkpoint(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    page = tmp_path / "film.HTML"
    sample(checkpoint("llama"), "--record", str(page))
    assert "<h1>out</h1>" in page.read_text(encoding="utf-8")


def test_an_empty_prompt_is_refused(checkpoint: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(
        app, ["sample", str(checkpoint("qwen3")), "--prompt", "-"], input="\n"
    )
    assert result.exit_code == 1
    assert "the prompt is empty. Give at least one word\n" in result.stderr
