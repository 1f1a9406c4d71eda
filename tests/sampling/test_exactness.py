"""Cached decoding against the whole text run anew: tokens, logits, and what is not run twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_decoders import DECODERS, MASK, Forwards, prompt, ragged, tiny
from transformers import PreTrainedModel

from dllm_convert.modeling.published.cache import BlockCache
from dllm_convert.modeling.published.canvas import Canvas

LENGTHS = {
    1: [1, 2, 3, 50, 99, 100],
    4: [1, 2, 3, 4, 49, 50, 51, 52, 97, 98, 99, 100],
    # Every residue of a block of 32, between 1 and 100.
    32: [residue + 32 * (residue % 3) + 1 for residue in range(32)] + [100],
}


@torch.no_grad()
def uncached(model: PreTrainedModel, ids: torch.Tensor, new: int, steps: int) -> list[int]:
    """Block-causal decoding that runs the whole text for every step, up to the last new token."""
    shift, size, length = model.config.diffusion["token_shift"], model.config.block_size, len(ids)
    canvas = ids
    for end in range((length // size + 1) * size, -(-(length + new) // size) * size + 1, size):
        canvas = torch.cat([canvas, torch.full((end - len(canvas),), MASK)])
        for left in range(steps, 0, -1):
            masked = (canvas == MASK) & (torch.arange(end) < length + new)
            if not masked.any():
                break
            logits = model(canvas[None], use_cache=False).logits[0]
            logits = torch.cat([logits[:1], logits[:-1]]) if shift else logits
            logits[:, MASK] = -torch.inf
            confidence, token = logits.softmax(-1).max(-1)
            quota = -(-int(masked.sum()) // left)
            best = confidence.masked_fill(~masked, -1).argsort(descending=True)[:quota]
            canvas[best] = token[best]
    return list(canvas[length : length + new].tolist())


@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize(
    ("family", "shift"), [*((family, True) for family in DECODERS), ("llama", False)]
)
def test_every_length_in_one_batch_equals_the_whole_text_run_anew(
    family: str, block: int, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = tiny(family, block=block, shift=shift).float(), min(block, 4)
    ids, mask = ragged(LENGTHS[block])
    worst = watch_logits(model, monkeypatch)
    got = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        max_denoising_steps=steps,
        eos_token_id=None,
    )
    for row, length in enumerate(LENGTHS[block]):
        expected = uncached(model, ids[row, mask[row].bool()], 5, steps)
        assert got[row, ids.shape[1] :].tolist() == expected, f"prompt of {length}"
    assert len(worst) > 0
    assert max(worst) < 1e-4


def watch_logits(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Compare the logits of every tenth denoising step with those of the whole text, run anew."""
    worst: list[float] = []
    original, calls = Canvas.denoise, itertools.count()

    def denoise(
        self: Canvas, logits: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor
    ) -> None:
        if next(calls) % 10 == 0:
            shift = int(self.options.token_shift)
            for number, piece in enumerate(logits.split(masked.sum(-1).tolist())):
                if len(piece):
                    end = int(columns[number, -1]) + 1
                    text = self.tokens[self.rows[number], :end]
                    whole = model(text[None], use_cache=False).logits[0]
                    expected = whole[columns[number, masked[number]] - shift]
                    worst.append(float((piece - expected).abs().max()))
        original(self, logits, columns, masked)

    monkeypatch.setattr(Canvas, "denoise", denoise)
    return worst


def test_nothing_is_run_twice_and_the_cache_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama", block=4), prompt(50)
    watched = Forwards(monkeypatch, model)
    places: set[tuple[int, int]] = set()
    update = BlockCache.update

    def look(self: BlockCache, keys: torch.Tensor, values: torch.Tensor, layer: int) -> Any:
        seen = update(self, keys, values, layer)
        places.add((layer, seen[0].data_ptr()))
        return seen

    monkeypatch.setattr(BlockCache, "update", look)
    got = model.generate(ids, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True)
    # 12 clean blocks of the prompt at once; 30 masks behind them, one per forward; each block but
    # the last is run once more, clean, together with the next.
    assert watched.shapes[0] == (1, 48)
    assert sorted(watched.shapes[1:]) == [(1, 4)] * (30 - 7) + [(1, 8)] * 7
    assert got.forwards == len(watched.shapes) == 31
    assert len(places) == model.config.num_hidden_layers


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    ("block", "settings"),
    [
        (None, {}),
        (None, {"guidance_scale": 2.0}),
        (None, {"block_length": 4}),
        (None, {"block_length": 4, "approximate_cache": True}),
        (None, {"remasking": "random", "remasking_ratio": 0.5, "max_denoising_steps": 3}),
        (1, {}),
        (4, {"confidence_threshold": 0.01}),
        (4, {"guidance_scale": 2.0}),
    ],
)
def test_forwards_told_are_those_that_were_run(
    block: int | None, settings: dict[str, Any], shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", block=block, shift=shift)
    ids, mask = ragged([3, 11])
    watched = Forwards(monkeypatch, model)
    told = []
    got = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=7,
        return_dict_in_generate=True,
        observer=lambda progress: told.append((progress.forwards, len(watched.shapes))),
        **settings,
    )
    assert got.forwards == len(watched.shapes)
    assert [first for first, _ in told] == [second for _, second in told]


def test_logits_are_asked_for_at_masks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama", block=4), prompt(8)
    watched = Forwards(monkeypatch, model)
    model.generate(ids, max_new_tokens=4, eos_token_id=None)
    # The prompt's last, then the masked ones whose predecessor is in the block.
    asked = [len(inputs["logits_at"]) for inputs in watched.inputs]
    assert asked[0] == 1
    assert len(asked) == 5
    assert all(count <= left for count, left in zip(asked[1:], [4, 3, 2, 1], strict=True))
    assert all(inputs["sees_all"] for inputs in watched.inputs[1:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_implementation_that_takes_a_mask_decodes(implementation: str) -> None:
    model = tiny("qwen2", block=4)
    model.set_attn_implementation(implementation)
    ids, mask = ragged([6, 13])
    settings: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None}
    got = model.generate(ids, attention_mask=mask, **settings)
    for row, length in enumerate([6, 13]):
        expected = uncached(model, prompt(length, seed=length)[0], 9, 4)
        assert got[row, 13:].tolist() == expected
        alone = model.generate(prompt(length, seed=length), **settings)
        assert alone[0, length:].tolist() == expected


@pytest.mark.parametrize("block", [None, 4])
def test_rows_that_are_done_cost_nothing(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", block=block)
    short, long = prompt(6, seed=1), prompt(6, seed=2)
    free = model.generate(torch.cat([short, long]), max_new_tokens=16, eos_token_id=None)[:, 6:]
    # A token that the one row writes and the other does not.
    end = next(int(token) for token in free[0, :8] if token not in free[1])
    settings: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": end}
    watched = Forwards(monkeypatch, model)
    for row in (short, long):
        model.generate(row, **settings)
    alone = watched.tokens
    watched.shapes.clear()
    model.generate(torch.cat([short, long]), **settings)
    assert watched.tokens == alone
    assert any(shape[0] == 1 for shape in watched.shapes)


def test_rows_at_different_blocks_share_their_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", block=4)
    ids, mask = ragged([3, 21])
    watched = Forwards(monkeypatch, model)
    model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=None)
    # The longer prompt's clean blocks; then neither row waits for the other.
    assert watched.shapes[0] == (2, 20)
    assert len(watched.shapes) <= 1 + 12 + 2
