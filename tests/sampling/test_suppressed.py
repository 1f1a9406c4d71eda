"""Ids that no token has are never written, whatever the model thinks of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from tiny_decoders import MASK, WORDS, prompt, tiny
from transformers import AutoModelForCausalLM

NEVER = (50, 51, 59)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "hot": {"temperature": 50.0, "top_k": 3},
    "threshold": {"confidence_threshold": 0.2},
    "bound": {"entropy_bound": 1.0},
    "margin": {"unmasking": "margin"},
    "remasked": {"remasking": "low_confidence", "remasking_ratio": 0.4},
    "guided": {"guidance_scale": 2.0},
}


def push(model: Any, logit: float, *tokens: int) -> Any:
    """Give some ids the same logit at every place, large to have them written, small to not."""
    head = torch.nn.Linear(model.config.hidden_size, WORDS, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.bias.zero_()
        head.bias[list(tokens)] = logit
    model.lm_head = head
    return model


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("block", [None, 4])
def test_what_is_suppressed_is_not_written(block: int | None, way: dict[str, Any]) -> None:
    model = push(tiny("llama", block=block), 20.0, *NEVER, MASK)
    settings = {"max_new_tokens": 12, "eos_token_id": None, "seed": 0, **way}
    free = model.generate(prompt(6), **settings)[0, 6:]
    assert set(free.tolist()) <= {*NEVER, 1}
    kept = model.generate(prompt(6), suppress_tokens=list(NEVER), **settings)[0, 6:]
    assert not set(kept.tolist()) & {*NEVER, MASK}


@pytest.mark.parametrize("block", [None, 4])
def test_suppressing_what_has_no_probability_changes_nothing(block: int | None) -> None:
    model = push(tiny("qwen2", block=block), -1e9, *NEVER)
    settings: dict[str, Any] = {"max_new_tokens": 12, "return_dict_in_generate": True}
    free = model.generate(prompt(6), **settings)
    kept = model.generate(prompt(6), suppress_tokens=list(NEVER), **settings)
    assert torch.equal(free.sequences, kept.sequences)
    assert free.forwards == kept.forwards


@pytest.mark.parametrize(
    ("value", "said"), [([WORDS], "ids below"), (["a"], "id"), (True, "id"), (1.5, "id")]
)
def test_what_is_no_id_is_refused(value: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"suppress_tokens .*{said}"):
        tiny("llama").generate(prompt(4), max_new_tokens=2, suppress_tokens=value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_a_conversion_names_the_rows_that_no_token_has(
    source_cache: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = tmp_path / "out"
    convert(source_cache(family), folder, "mdlm")
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = {*vocabulary["model"]["vocab"].values()}
    ids |= {token["id"] for token in vocabulary["added_tokens"]}
    unused = sorted({*range(config["vocab_size"])} - ids)
    written = json.loads((folder / "generation_config.json").read_text())
    assert written.get("suppress_tokens", []) == unused
    if family == "llama":
        assert unused
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert model.generation_config.suppress_tokens == unused
