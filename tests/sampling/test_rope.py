"""Beyond every threshold of a config: cached is whole, a batch is its rows, neighbours are none."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tiny_decoders import DECODERS, MASK, prompt, ragged, tiny

from dllm_convert.diffusion.objective import Objective
from dllm_convert.evaluation.continuation import Continuation, Estimator, score_round
from dllm_convert.modeling.published.canvas import Canvas
from dllm_convert.modeling.published.rope import depends_on_length, final_lengths

pytestmark = pytest.mark.filterwarnings("ignore:a prompt of")

THETA = {"rope_theta": 10000.0}
HALF = {"llama": 4, "mistral": 4, "qwen2": 4, "qwen3": 8}


def scaling(family: str, kind: str) -> dict[str, Any]:
    half = HALF[family]
    more: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 24},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "short_factor": [1.0 + 0.1 * n for n in range(half)],
            "long_factor": [1.5 + n for n in range(half)],
        },
        "llama3": {
            **{"factor": 4.0, "original_max_position_embeddings": 24},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    }
    return {"rope_type": kind, **THETA, **more[kind]}


KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
LENGTHS = [6, 20, 33, 61]
"""Before and behind 24 tokens, the original context, and 48, the present one."""


def scaled(family: str, kind: str, block: int | None = 4, **fields: Any) -> Any:
    return tiny(
        family,
        block=block,
        max_position_embeddings=48,
        rope_parameters=scaling(family, kind),
        **fields,
    )


CASES = [
    *((family, kind) for family in DECODERS for kind in ("dynamic", "longrope")),
    *(("llama", kind) for kind in KINDS if kind not in ("dynamic", "longrope")),
]
"""Every family where the length counts; of those where it does not, one speaks for all."""


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_row_does_not_depend_on_its_batch(family: str, kind: str, block: int | None) -> None:
    model = scaled(family, kind, block)
    assert depends_on_length(model) == (kind in ("dynamic", "longrope"))
    ids, mask = ragged(LENGTHS)
    settings: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **settings)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(prompt(length, seed=length), **settings)
        assert together[row, max(LENGTHS) :].tolist() == alone[0, length:].tolist(), length
    again = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(together, again), "nothing stays from an earlier call"


def watch(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Compare logits with those of the whole final text, masks behind it, run anew."""
    worst: list[float] = []
    original, calls = Canvas.denoise, itertools.count()

    def denoise(self: Canvas, logits: torch.Tensor, columns: Any, masked: Any) -> None:
        if next(calls) % 3 == 0:
            shift = int(self.options.token_shift)
            for number, piece in enumerate(logits.split(masked.sum(-1).tolist())):
                if len(piece):
                    row = self.rows[number]
                    text = self.tokens[row, : self.limits[row]]
                    whole = model(text[None], use_cache=False).logits[0]
                    expected = whole[columns[number, masked[number]] - shift]
                    worst.append(float((piece - expected).abs().max()))
        original(self, logits, columns, masked)

    monkeypatch.setattr(Canvas, "denoise", denoise)
    return worst


@pytest.mark.parametrize("block", [4, 32])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_cached_is_whole(
    family: str, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scaled(family, kind, block)
    worst = watch(model, monkeypatch)
    ids, mask = ragged(LENGTHS)
    settings: dict[str, Any] = {"max_new_tokens": 9, "max_denoising_steps": 3}
    model.generate(ids, attention_mask=mask, eos_token_id=None, **settings)
    assert len(worst) > 2
    assert max(worst) < 1e-9


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_does_not_depend_on_neighbours_or_on_what_was_run_before(
    kind: str, side: str
) -> None:
    model = scaled("llama", kind)
    ids, mask = ragged(LENGTHS, side)
    alone = [model(prompt(length, seed=length)).logits[0] for length in LENGTHS]
    together = model(ids, attention_mask=mask).logits
    for row, length in enumerate(LENGTHS):
        found = together[row, mask[row].bool()]
        assert torch.allclose(found, alone[row], atol=1e-9), length
        again = model(prompt(length, seed=length)).logits[0]
        assert torch.equal(again, alone[row])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_are_those_of_transformers_at_that_length(kind: str) -> None:
    model = scaled("llama", kind)
    for length in (10, 24, 25, 48, 49, 70):
        fresh = scaled("llama", kind).model.rotary_emb
        x, positions = torch.zeros(1, dtype=torch.float64), torch.arange(length)[None]
        expected = type(fresh).forward(fresh, x, positions)
        with final_lengths(model, lambda known=length: torch.tensor([known])):
            found = model.model.rotary_emb(x, position_ids=positions[:, :5])
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other[:, :5])


def test_guidance_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled("llama", "longrope")
    ids, mask = ragged(LENGTHS)
    settings: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None, "guidance_scale": 2.0}
    together = model.generate(ids, attention_mask=mask, **settings)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(prompt(length, seed=length), **settings)
        assert together[row, max(LENGTHS) :].tolist() == alone[0, length:].tolist()
    model = scaled("qwen2", "dynamic", None, num_hidden_layers=1)
    settings = {"max_new_tokens": 9, "eos_token_id": None, "block_length": 3}
    exact = model.generate(ids, attention_mask=mask, **settings)
    kept = model.generate(ids, attention_mask=mask, approximate_cache=True, **settings)
    assert torch.equal(exact, kept)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scores_do_not_depend_on_the_batch(kind: str) -> None:
    model = scaled("llama", kind)
    objective = Objective("bd3lm", MASK, True, 4)
    texts = [
        Continuation(tuple(prompt(length, seed=length)[0].tolist()), length // 2, length)
        for length in LENGTHS
    ]
    found = [
        score_round(model, texts, objective, Estimator(draws=2, batch_size=size)) for size in (1, 4)
    ]
    assert torch.allclose(*found, atol=1e-6)


def test_a_model_that_was_decoded_with_is_copied_and_saved(tmp_path: Any) -> None:
    model = scaled("llama", "longrope").float()
    text = model.generate(prompt(30), max_new_tokens=4, eos_token_id=None)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(prompt(30), max_new_tokens=4, eos_token_id=None), text)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(prompt(30), max_new_tokens=4, eos_token_id=None), text)
    assert not (text == MASK).any()
