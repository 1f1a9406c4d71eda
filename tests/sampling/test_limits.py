"""At its limit a setting is as good as not given: the same tokens, in as many forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_decoders import MASK, WORDS, prompt, ragged, tiny

from dllm_convert.modeling.published.choosing import Ratings, make_warpers, rate_tokens
from dllm_convert.modeling.published.options import DecodingOptions

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {"max_denoising_steps": 3},
    "threshold": {"confidence_threshold": 0.3},
    "bound": {"entropy_bound": 1.5},
    "bound-by-entropy": {"entropy_bound": 1.5, "unmasking": "entropy"},
    "margin": {"unmasking": "margin", "max_denoising_steps": 3},
    "random": {"unmasking": "random", "max_denoising_steps": 3},
    "guided": {"guidance_scale": 2.0, "confidence_threshold": 0.3},
    "remasked": {
        "remasking": "low_confidence",
        "remasking_ratio": 0.4,
        "confidence_threshold": 0.1,
    },
    "remasked-random": {"remasking": "random", "remasking_ratio": 0.4},
}
GREEDY: dict[str, dict[str, Any]] = {
    "cold": {"temperature": 0.01},
    "colder": {"temperature": 1e-9},
    "coldest": {"temperature": 5e-324},
    "top_k=1": {"temperature": 1.0, "top_k": 1},
    "hot, top_k=1": {"temperature": 50.0, "top_k": 1},
    "top_p=0": {"temperature": 1.0, "top_p": 0.0},
    "min_p=1": {"temperature": 1.0, "min_p": 1.0},
    "not sampled": {"do_sample": False, "temperature": 1.0, "top_p": 0.5},
}
NEUTRAL: dict[str, dict[str, Any]] = {
    "threshold=1": {"confidence_threshold": 1.0},
    "threshold=1.5": {"confidence_threshold": 1.5},
    "threshold->1": {"confidence_threshold": 1 - 1e-12},
    "bound=0": {"entropy_bound": 0.0},
    "bound->0": {"entropy_bound": 1e-9},
    "guidance=1": {"guidance_scale": 1},
    "remasking none": {"remasking": "low_confidence", "remasking_ratio": 0.0},
    "steps=tokens": {"max_denoising_steps": 16},
    "steps>tokens": {"max_denoising_steps": 400},
}
DRAWN: dict[str, dict[str, Any]] = {
    "top_k=0": {"top_k": 0},
    "top_k=vocabulary": {"top_k": WORDS},
    "top_k>vocabulary": {"top_k": 10 * WORDS},
    "top_p=1": {"top_p": 1.0},
    "top_p->1": {"top_p": 1 - 1e-12},
    "min_p=0": {"min_p": 0.0},
    "min_p->0": {"min_p": 1e-30},
    "sampled": {"do_sample": True},
}
BLOCKS = [None, 4]


def run(block: int | None, **settings: Any) -> tuple[list[list[int]], int, list[list[int]]]:
    ids, mask = ragged([9, 4])
    ends = {"eos_token_id": settings.pop("ends", None)}
    # Confident enough that thresholds commit several tokens at once, as trained models are.
    model = tiny("llama", block=block)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    output = model.generate(
        ids,
        attention_mask=mask,
        seed=3,
        return_dict_in_generate=True,
        output_order=True,
        **{"max_new_tokens": 12, **ends, **settings},
    )
    return output.sequences.tolist(), output.forwards, output.order.tolist()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rule", list(RULES))
def test_drawing_that_leaves_one_token_is_greedy(block: int | None, rule: str) -> None:
    greedy = run(block, **RULES[rule])
    for name, setting in GREEDY.items():
        assert run(block, **{**RULES[rule], **setting}) == greedy, name


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_limit_equals_the_absence(block: int | None, temperature: float) -> None:
    ends = [30, 31, 32, 33, 34, 35]
    without = run(block, temperature=temperature, ends=ends)
    for name, setting in NEUTRAL.items():
        assert run(block, temperature=temperature, ends=ends, **setting) == without, name


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rule", ["plain", "threshold", "bound", "remasked"])
def test_warpers_that_leave_everything_change_nothing(block: int | None, rule: str) -> None:
    without = run(block, temperature=1.0, **RULES[rule])
    for name, setting in DRAWN.items():
        assert run(block, **{**RULES[rule], "temperature": 1.0, **setting}) == without, name


@pytest.mark.parametrize("name", ["block_length", "guided", "threshold"])
def test_limits_of_the_canvas(name: str) -> None:
    """One window as long as the text; nothing but the mask before it; everything at once."""
    if name == "block_length":
        assert run(None, block_length=12) == run(None)
        assert run(None, block_length=400) == run(None)
    elif name == "guided":
        assert run(None, guidance_scale=1.0) == run(None)
        assert run(None, guidance_scale=1.0 + 1e-12) == run(None)
    else:
        assert run(None, confidence_threshold=0.0)[1] == 1 == run(None, max_denoising_steps=1)[1]


@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize(
    "warp", [{"temperature": 0.1}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.2}]
)
def test_how_sure_the_model_is_does_not_depend_on_what_is_drawn(
    scale: float, warp: dict[str, Any]
) -> None:
    logits = torch.randn(50, WORDS, generator=torch.Generator().manual_seed(1)) * scale

    def rate(**fields: Any) -> Ratings:
        options = DecodingOptions(MASK, 8, entropy_bound=0.1, unmasking="margin", **fields)
        seeded = [torch.Generator().manual_seed(0)]
        return rate_tokens(logits.clone(), [50], options, seeded, make_warpers(options))

    greedy, drawn = rate(), rate(**{"temperature": 1.0, **warp})
    assert torch.equal(greedy.entropy, drawn.entropy)
    assert torch.equal(greedy.score, drawn.score)
    own = logits.clone()
    own[:, MASK] = -torch.inf
    assert drawn.token is not None
    assert torch.allclose(drawn.confidence, own.softmax(-1).gather(1, drawn.token[:, None])[:, 0])
    assert (drawn.confidence <= greedy.confidence).all()


def test_greedy_decoding_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, dim: (calls.append(len(x)), softmax(x, dim))[1]
    )
    monkeypatch.setattr(torch, "multinomial", lambda *_: pytest.fail("a token was drawn"))
    options = DecodingOptions(MASK, 8)
    rate_tokens(torch.randn(6, WORDS), [6], options, [None], make_warpers(options))
    assert calls == [6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence_threshold": -0.1}, "confidence_threshold is -0.1, expected at least 0"),
        ({"confidence_threshold": "0.9"}, "confidence_threshold is '0.9'"),
        ({"confidence_threshold": float("nan")}, "confidence_threshold is nan"),
        ({"entropy_bound": -1}, "entropy_bound is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k is 2.5"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
        ({"temperature": 1.0, "min_p": -0.5}, "min_p is -0.5"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"remasking": "random", "remasking_ratio": 1.0}, "remasking_ratio is 1.0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_denoising_steps": True}, "max_denoising_steps is True"),
    ],
)
def test_a_value_out_of_its_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("llama").generate(prompt(4), **settings)
