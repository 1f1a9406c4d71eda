"""Lossless decoding as people ask for it: `sample --lossless`, Python, settings of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversion import convert, sample
from gated import gated_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_convert as dc
from dllm_convert.errors import DllmConvertError, RequestError
from dllm_convert.recipe.loading import load_recipe

PROMPT = "The block in which a name is bound"


@pytest.fixture(scope="module")
def gated(source_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossless") / "gated"
    gated_folder(source_cache("qwen3"), folder)
    return folder


def base_text(folder: Path, new: int) -> str:
    """What the folder writes greedily without our code."""
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = base.generate(ids, max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_the_command_writes_the_bases_text(gated: Path) -> None:
    given = ("--prompt", PROMPT, "--max-new-tokens", "24", "--json")
    found = json.loads(sample(gated, *given, "--lossless").stdout)
    assert found["text"] == base_text(gated, 24)
    assert found["close"] == 0
    assert (
        json.loads(sample(gated, *given, "--verify-with", "base").stdout)["text"] == found["text"]
    )
    denoised = json.loads(sample(gated, *given).stdout)
    assert denoised["text"] != found["text"]
    assert denoised["close"] is None


def test_python_writes_the_same(gated: Path) -> None:
    one = dc.sample(gated, PROMPT, max_new_tokens=24, lossless=True)
    two = dc.sample(dc.load(gated), [PROMPT], max_new_tokens=24, lossless=True)
    assert one.text == two[0].text == base_text(gated, 24)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--threshold", "0.9"), "--threshold does nothing beside --verify-with"),
        (("--steps", "4"), "--steps does nothing beside --verify-with"),
        (("--remasking", "random"), "leave"),
        (("--verify-with", "self", "--infill", "block"), "left to right"),
    ],
)
def test_what_does_not_go_with_it_is_refused(gated: Path, more: tuple[str, ...], said: str) -> None:
    refused = sample(gated, "--prompt", PROMPT, "--lossless", *more, code=2)
    assert said in " ".join(refused.output.replace("│", " ").split())


def test_a_model_without_a_verifier_says_so(source_cache: Any, tmp_path: Path) -> None:
    convert(source_cache("llama"), tmp_path / "open", "bd3lm", block=8)
    refused = sample(tmp_path / "open", "--lossless", code=2)
    assert "strictly causally" in " ".join(refused.output.replace("│", " ").split())
    with pytest.raises(RequestError, match="strictly causally"):
        dc.sample(tmp_path / "open", PROMPT, verify_with="base")


def test_a_recipe_asks_for_the_verifier_that_it_trains() -> None:
    given: dict[str, Any] = {"target": "bd3lm", "block_size": 8, "generation.verify_with": "self"}
    with pytest.raises(DllmConvertError, match="goes on from clean tokens by itself"):
        load_recipe("smollm2-135m", overrides=given)
    trained = load_recipe("smollm2-135m", overrides={**given, "training.ar_loss_weight": 1.0})
    assert trained.generation.verify_with == "self"
    with pytest.raises(DllmConvertError, match="keep-base"):
        load_recipe("smollm2-135m", overrides={**given, "generation.verify_with": "base"})
