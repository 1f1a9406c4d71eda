"""Decoding against ten-line references, token for token."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch
from factory import FAMILIES
from tiny_decoders import DECODERS, MASK, WORDS, prompt, ragged, tiny
from transformers import PreTrainedModel

from dllm_convert.adapters import get_adapter


@torch.no_grad()
def reference(model: PreTrainedModel, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Uncached: whole blocks of masks, one full pass per token, the likeliest token first.

    Nothing is written behind the last new token, though the model sees masks there.
    """
    shift, length = model.config.diffusion["token_shift"], ids.shape[1]
    size = getattr(model.config, "block_size", None) or length + new
    canvas = ids
    for end in range((length // size + 1) * size, -(-(length + new) // size) * size + 1, size):
        fill = torch.full((1, end - canvas.shape[1]), MASK)
        canvas = torch.cat([canvas, fill], 1)
        while (canvas[0, length : length + new] == MASK).any():
            logits = model(canvas, use_cache=False).logits[0]
            logits = torch.cat([logits[:1], logits[:-1]]) if shift else logits
            logits[:, MASK] = -torch.inf
            confidence, token = logits.float().softmax(-1).max(-1)
            confidence[canvas[0] != MASK] = -1
            confidence[length + new :] = -1
            best = int(confidence.argmax())
            canvas[0, best] = token[best]
    return canvas[0, length : length + new]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("block", "length"), [(1, 3), (4, 1), (4, 4), (4, 7), (32, 5), (32, 40)])
def test_cached_blocks_equal_the_uncached_reference(family: str, block: int, length: int) -> None:
    model, ids = tiny(family, block=block), prompt(length)
    got = model.generate(ids, max_new_tokens=9, eos_token_id=None)
    assert torch.equal(got[:, :length], ids)
    assert got[0, length:].tolist() == reference(model, ids, 9).tolist()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_canvas_equals_the_reference(family: str) -> None:
    model, ids = tiny(family), prompt(6)
    got = model.generate(ids, max_new_tokens=8, eos_token_id=None)
    assert got[0, 6:].tolist() == reference(model, ids, 8).tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_block_size_one_with_shift_is_greedy_autoregression(family: str) -> None:
    import transformers

    model, ids = tiny(family, block=1), prompt(5)
    config = type(model.config)(
        **{**model.config.to_dict(), "is_causal": True, "vocab_size": WORDS}
    )
    base = getattr(transformers, get_adapter(family).stock_class)(config).eval().double()
    base.load_state_dict(model.state_dict())
    ours = model.generate(ids, max_new_tokens=12, eos_token_id=None)
    never_mask = base.generate(
        ids,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[MASK],
        pad_token_id=1,
    )
    assert ours.tolist() == never_mask.tolist()


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_a_batch_of_lengths_equals_one_by_one(
    block: int | None, side: str, threshold: float | None
) -> None:
    model = tiny("llama", block=block)
    prompts = [prompt(length, seed=length) for length in (3, 9, 14)]
    ids, mask = torch.ones(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
    for row, one in enumerate(prompts):
        place = slice(14 - one.shape[1], 14) if side == "left" else slice(0, one.shape[1])
        ids[row, place], mask[row, place] = one[0], 1
    settings: dict[str, Any] = {
        "max_new_tokens": 7,
        "confidence_threshold": threshold,
        "eos_token_id": None,
    }
    together = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(together[:, :14], ids)
    for row, one in enumerate(prompts):
        alone = model.generate(one, **settings)
        assert together[row, 14:].tolist() == alone[0, one.shape[1] :].tolist()


def test_rows_stop_at_their_end_and_are_padded_after_it() -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    free = model.generate(ids, max_new_tokens=16, eos_token_id=None)[0, 6:]
    end = int(free[5])
    stop = free.tolist().index(end)
    got = model.generate(ids, max_new_tokens=16, eos_token_id=end, return_dict_in_generate=True)
    assert got.sequences[0, 6:].tolist() == free[: stop + 1].tolist() + [1] * (15 - stop)
    unstopped = model.generate(
        ids, max_new_tokens=16, eos_token_id=None, return_dict_in_generate=True
    )
    assert got.forwards < unstopped.forwards


def test_an_ended_row_does_not_disturb_the_others() -> None:
    model = tiny("llama", block=4)
    one, two = prompt(6, seed=1), prompt(6, seed=2)
    end = int(model.generate(one, max_new_tokens=16, eos_token_id=None)[0, 7])
    settings: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": end}
    together = model.generate(torch.cat([one, two]), **settings)
    assert together[0].tolist() == model.generate(one, **settings)[0].tolist()
    assert together[1].tolist() == model.generate(two, **settings)[0].tolist()


def test_steps_bound_the_forwards_of_a_block() -> None:
    model, ids = tiny("llama", block=8), prompt(8)
    got = model.generate(
        ids,
        max_new_tokens=16,
        max_denoising_steps=2,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    # The prompt and two blocks of two steps; the second's first writes the first into the cache.
    assert got.forwards == 1 + 2 * 2
    assert got.tokens_per_forward == pytest.approx(16 / 5)


def test_a_threshold_of_nearly_zero_writes_a_block_per_forward() -> None:
    model, ids = tiny("llama", block=8), prompt(8)
    got = model.generate(
        ids,
        max_new_tokens=8,
        confidence_threshold=1e-6,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert got.forwards == 2


def test_denoising_leaves_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama", block=4), prompt(8)
    lengths = []
    original = type(model).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["past_key_values"].get_seq_length())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    model.generate(ids, max_new_tokens=8, eos_token_id=None)
    assert [length for length, _ in itertools.groupby(lengths)] == [0, 8, 12]


def test_a_seed_makes_sampling_repeatable() -> None:
    model, ids = tiny("llama", block=4), prompt(4)
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "eos_token_id": None}
    first = model.generate(ids, seed=1, **settings)
    assert torch.equal(first, model.generate(ids, seed=1, **settings))
    assert not torch.equal(first, model.generate(ids, seed=2, **settings))
    assert not (first == MASK).any()


def test_unknown_settings_and_empty_prompts_are_refused() -> None:
    model = tiny("llama", block=4)
    with pytest.raises(ValueError, match="num_beams is 4, which is refused"):
        model.generate(prompt(3), num_beams=4)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="takes no labels"):
        model(prompt(3), labels=prompt(3))


@torch.no_grad()
def causal_context_reference(model: PreTrainedModel, ids: torch.Tensor, new: int) -> list[int]:
    """Uncached: clean blocks see what stands before them, the block being written all of it."""
    size, length = model.config.block_size, ids.shape[1]
    canvas = ids
    for start in range(length // size * size, length + new, size):
        fill = torch.full((1, start + size - canvas.shape[1]), MASK)
        canvas = torch.cat([canvas, fill], 1)
        mask = torch.ones(start + size, start + size).tril().bool()
        mask[start:, start:] = True
        while (canvas[0, length : length + new] == MASK).any():
            logits = model(canvas, attention_mask=mask[None, None], use_cache=False).logits[0]
            logits = torch.cat([logits[:1], logits[:-1]])
            logits[:, MASK] = -torch.inf
            confidence, token = logits.float().softmax(-1).max(-1)
            confidence[canvas[0] != MASK] = -1
            confidence[length + new :] = -1
            best = int(confidence.argmax())
            canvas[0, best] = token[best]
    return list(canvas[0, length : length + new].tolist())


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("length", [3, 4, 10])
def test_a_causal_context_is_read_as_it_was_trained(family: str, length: int) -> None:
    model, ids = tiny(family, block=4), prompt(length)
    plain = model.generate(ids, max_new_tokens=13, eos_token_id=None)[0, length:].tolist()
    model.config.diffusion["context"] = "causal"
    got = model.generate(ids.repeat(2, 1), max_new_tokens=13, eos_token_id=None)
    expected = causal_context_reference(model, ids, 13)
    assert got[0, length:].tolist() == got[1, length:].tolist() == expected
    assert length < 4 or plain != expected


@pytest.mark.parametrize("block", [None, 4])
def test_the_uniform_kernel_shows_random_tokens_and_never_the_mask(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama", block=block), prompt(6)
    model.config.diffusion["noise_kernel"] = "uniform"
    forward, seen = type(model).forward, []

    def watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(args[0] if args else kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watch)
    settings: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "seed": 3}
    first = model.generate(ids, **settings)
    assert all((tokens != MASK).all() for tokens in seen)
    assert len({tuple(tokens[0].tolist()) for tokens in seen}) == len(seen)
    assert torch.equal(first[:, :6], ids)
    assert (first != MASK).all()
    assert torch.equal(model.generate(ids, **settings), first)
    batch = model.generate(torch.cat([prompt(6, 9), ids]), **{**settings, "seed": 2})
    assert torch.equal(batch[1], first[0])


@pytest.mark.parametrize("block", [None, 4])
def test_noise_beside_a_longer_row_is_the_same(block: int | None) -> None:
    model = tiny("llama", block=block)
    model.config.diffusion["noise_kernel"] = "uniform"
    ids, mask = ragged([3, 14])
    settings: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, seed=[5, 6], **settings)
    alone = model.generate(ids[:1, -3:], seed=[5], **settings)
    assert together[0, 14:].tolist() == alone[0, 3:].tolist()


@pytest.mark.parametrize("block", [None, 4])
def test_an_observer_sees_every_forward_and_changes_nothing(block: int | None) -> None:
    model = tiny("llama", block=block)
    ids, mask = torch.cat([prompt(9, 1), prompt(9, 2)]), torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    seen: list[Any] = []
    settings: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None}
    got = model.generate(
        ids, attention_mask=mask, observer=seen.append, return_dict_in_generate=True, **settings
    )
    assert torch.equal(got.sequences, model.generate(ids, attention_mask=mask, **settings))
    first, last = seen[0], seen[-1]
    assert first.canvas.shape == first.committed.shape == (2, 16)
    assert first.canvas[1, :3].tolist() == ids[1, 6:].tolist()
    assert (first.canvas[1, 3:10] == MASK).all()
    assert first.lengths.tolist() == [9, 3]
    assert first.committed.sum(-1).tolist() == [9, 3]
    assert last.committed.sum(-1).tolist() == [16, 10]
    assert last.canvas[0].tolist() == got.sequences[0].tolist()
    assert last.canvas[1, 3:10].tolist() == got.sequences[1, 9:].tolist()
    forwards = [progress.forwards for progress in seen]
    assert forwards == sorted(set(forwards))
    for before, after in itertools.pairwise(seen):
        assert (after.committed | ~before.committed).all()
        assert torch.equal(before.canvas[before.committed], after.canvas[before.committed])


@pytest.mark.parametrize("seed", ["s", "12", 1.5, ["a"], [1.0], [1, 2], []])
def test_a_seed_that_is_none(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        tiny("llama", block=4).generate(prompt(6), seed=seed, max_new_tokens=2)


@pytest.mark.parametrize("block", [None, 4, 32])
@pytest.mark.parametrize("new", [1, 2, 5, 9])
def test_no_forward_is_spent_on_what_nobody_gets(block: int | None, new: int) -> None:
    """Of a block that goes beyond the tokens that were asked for only these are written."""
    model, ids = tiny("llama", block=block), prompt(6)
    out = model.generate(
        ids, max_new_tokens=new, eos_token_id=None, return_dict_in_generate=True, output_order=True
    )
    blocks = len({(6 + n) // block for n in range(new)}) if block else 0
    # One token a forward; one for the prompt, if it fills a block; the next block's first token
    # comes with the forward that puts the one before into the cache.
    assert new <= out.forwards <= new + blocks
    assert sorted(out.order[0, 6:].tolist()) == sorted(set(out.order[0, 6:].tolist()))


@pytest.mark.parametrize("how", [{}, {"max_denoising_steps": 3}, {"confidence_threshold": 0.02}])
@pytest.mark.parametrize("block", [None, 32])
def test_behind_the_end_of_a_text_nothing_is_written(
    block: int | None, how: dict[str, Any]
) -> None:
    model, ids = tiny("llama", block=block), prompt(6)
    free = model.generate(ids, max_new_tokens=24, eos_token_id=None, **how)[0, 6:].tolist()
    # A token that is not the first to be there, as the end: from there on it is another text.
    end = next((token for n, token in enumerate(free) if n > 2 and token not in free[:n]), free[-1])
    seen: list[Any] = []
    out = model.generate(
        ids, max_new_tokens=24, eos_token_id=end, observer=seen.append,
        return_dict_in_generate=True, **how,
    )  # fmt: skip
    text = out.sequences[0, 6:].tolist()
    if end in text:
        stop = 6 + text.index(end)
        ended = [p for p in seen if (p.committed[0, 6:] & (p.canvas[0, 6:] == end)).any()]
        behind = [int(p.committed[0, stop + 1 :].sum()) for p in ended]
        assert len(set(behind)) == 1, "no more after it was written"


@torch.no_grad()
def parts_reference(
    model: PreTrainedModel, ids: torch.Tensor, new: int, part: int, steps: int | None
) -> list[int]:
    """Uncached: of a block only the first part with a mask is written, its steps counted anew."""
    size, length, shift = (
        model.config.block_size,
        ids.shape[1],
        model.config.diffusion["token_shift"],
    )
    canvas = ids
    for start in range(length // size * size, length + new, size):
        canvas = torch.cat([canvas, torch.full((1, start + size - canvas.shape[1]), MASK)], 1)
        for first in range(start, start + size, part):
            here = torch.zeros(start + size, dtype=torch.bool)
            here[max(first, length) : min(first + part, start + size, length + new)] = True
            left = steps
            while (open_ := here & (canvas[0] == MASK)).any():
                logits = model(canvas, use_cache=False).logits[0]
                logits = torch.cat([logits[:1], logits[:-1]]) if shift else logits
                logits[:, MASK] = -torch.inf
                confidence, token = logits.float().softmax(-1).max(-1)
                confidence[~open_] = -1
                now = 1 if left is None else -(-int(open_.sum()) // left)
                left = None if left is None else left - 1
                best = confidence.topk(now).indices
                canvas[0, best] = token[best]
    return list(canvas[0, length : length + new].tolist())


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("part", "steps"), [(2, None), (3, None), (3, 2)])
@pytest.mark.parametrize("shift", [True, False])
def test_a_block_is_written_in_parts(
    family: str, part: int, steps: int | None, shift: bool
) -> None:
    model, lengths = tiny(family, block=8, shift=shift), (3, 8, 13)
    ids, mask = ragged(list(lengths))
    settings = {"max_new_tokens": 19, "eos_token_id": None, "max_denoising_steps": steps}
    got = model.generate(ids, attention_mask=mask, sub_block_size=part, output_order=True,
                         return_dict_in_generate=True, **settings)  # fmt: skip
    whole = model.generate(ids, attention_mask=mask, **settings)
    assert not torch.equal(got.sequences, whole)
    for row, length in enumerate(lengths):
        expected = parts_reference(model, ids[row : row + 1, -length:], 19, part, steps)
        assert got.sequences[row, -19:].tolist() == expected
        # Nothing of a part is written before all of the part before it.
        order, place = got.order[row, -19:], torch.arange(length, length + 19)
        number = place // 8 * 8 + place % 8 // part
        for one, other in pairwise(number.unique().tolist()):
            assert int(order[number == one].max()) < int(order[number == other].min())


def test_parts_as_large_as_blocks_are_blocks_and_mdlm_has_none() -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    plain = model.generate(ids, max_new_tokens=9)
    for part in (4, 7):
        assert torch.equal(model.generate(ids, max_new_tokens=9, sub_block_size=part), plain)
    assert not torch.equal(model.generate(ids, max_new_tokens=9, sub_block_size=1), plain)
    with pytest.raises(ValueError, match="MDLM has none"):
        tiny("llama").generate(ids, max_new_tokens=9, sub_block_size=2)
    with pytest.raises(ValueError, match="remasking and sub_block_size"):
        model.generate(ids, max_new_tokens=9, sub_block_size=2, remasking="random")
    with pytest.raises(ValueError, match="sub_block_size is 0"):
        model.generate(ids, max_new_tokens=9, sub_block_size=0)
