"""The mask in two integers per token: the rule it stands for, and flex attention's blocks of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dllm_convert.diffusion.attention import CLEAN, TILE, UNUSED, StreamMask
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import closed_pairs, predict

MASK = 5


def rows(count: int, length: int, seed: int) -> TextBatch:
    """Rows of documents of many lengths, some padded at the end, some with tokens left out."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 40, (count, length), generator=draw)
    segments, positions = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    for row in range(count):
        at, document = 0, 0
        while at < length - (row % 3) * 9:
            end = min(at + int(torch.randint(1, length, (), generator=draw)), length)
            segments[row, at:end], positions[row, at:end] = document, torch.arange(end - at)
            at, document = end, document + 1
    loss = torch.rand(count, length, generator=draw) < 0.3
    return TextBatch(tokens, segments, positions, loss if seed % 2 else None)


def stated(mask: StreamMask) -> torch.Tensor:
    """What `StreamMask` says in words, pair by pair: (batch, width, width), bool."""
    batch, width = mask.streams.shape
    seen = torch.zeros(batch, width, width, dtype=torch.bool)
    columns = (mask.streams, mask.blocks, mask.segments, mask.positions)
    for row in range(batch):
        tokens = list(zip(*(column[row].tolist() for column in columns), strict=True))
        for q, (stream, block, segment, position) in enumerate(tokens):
            for k, (s, b, document, place) in enumerate(tokens):
                opened = segment == document and document >= 0 and UNUSED not in (s, stream)
                here = stream == s and block == b
                if mask.causal_clean and stream == s == CLEAN:
                    here = here and place <= position
                opened = opened and (here or (s == CLEAN and b < block))
                if mask.closed is not None:
                    opened = opened and not bool(mask.closed[position, place])
                seen[row, q, k] = opened or q == k
    return seen


CASES = [
    (Objective("bd3lm", MASK, True, 4), ForwardProcess(draw="count"), {}),
    (Objective("bd3lm", MASK, False, 7), ForwardProcess(views=3, complementary=True), {}),
    (Objective("bd3lm", MASK, True, 5, context="causal"), ForwardProcess(), {"ar_loss": True}),
    (Objective("bd3lm", MASK, True, 1), ForwardProcess(views=2), {}),
    (Objective("mdlm", MASK, True), ForwardProcess(draw="count", views=2), {}),
]
NAMES = ["block", "views", "causal", "one-token", "mdlm"]


@pytest.mark.parametrize("anneals", [False, True], ids=["open", "annealed"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_two_integers_say_who_sees_whom(case: tuple[object, ...], anneals: bool) -> None:
    objective, process, settings = case
    closed = closed_pairs(40, 0.5, torch.Generator().manual_seed(3)) if anneals else None
    for seed in range(3):
        batch = rows(3, 40, seed)
        views = corrupt(batch, objective, process, NoiseKey(seed, 0, 0, 3))  # type: ignore[arg-type]
        forward = predict(batch, views, objective, closed=closed, **settings)  # type: ignore[arg-type]
        mask = forward.mask
        assert mask is not None
        # Rows of one column differ from what nobody reads: those see themselves alone.
        assert torch.equal(mask.dense()[:, 0], stated(mask))
        assert mask.rule.code.dtype == torch.int32


@pytest.mark.parametrize("length", [128, 200, 384])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_blocks_of_flex_attention_are_those_that_torch_finds(
    case: tuple[object, ...], length: int
) -> None:
    objective, process, settings = case
    for seed, multiple in ((0, TILE), (1, TILE), (2, 16)):
        batch = rows(3, length, seed)
        views = corrupt(batch, objective, process, NoiseKey(seed, 0, 0, 3))  # type: ignore[arg-type]
        forward = predict(batch, views, objective, multiple=multiple, **settings)  # type: ignore[arg-type]
        assert forward.mask is not None
        width = forward.inputs["input_ids"].shape[1]
        assert width % multiple == 0 or multiple == 16
        rule, ours = forward.mask.rule, forward.block_mask()
        theirs = create_block_mask(
            lambda b, _, q, k, rule=rule: rule.allows(b, q, k),
            len(rule.code), None, width, width, device="cpu",
        )  # fmt: skip
        assert ours is not None
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
            mine, expected = getattr(ours, name), getattr(theirs, name)
            used = getattr(ours, name.replace("indices", "num_blocks"))[..., None]
            real = torch.arange(mine.shape[-1]) < used
            assert torch.equal(mine[real], expected[real]), name
            assert mine.dtype == expected.dtype == torch.int32


def test_a_wider_row_changes_no_loss() -> None:
    for objective, process, settings in CASES:
        batch = rows(3, 40, 1)
        views = corrupt(batch, objective, process, NoiseKey(0, 0, 0, 3))
        narrow = predict(batch, views, objective, **settings)
        wide = predict(batch, views, objective, multiple=TILE, **settings)
        assert wide.inputs["input_ids"].shape[1] % TILE == 0
        for name in ("targets", "weight", "rows", "ar_targets"):
            assert torch.equal(getattr(narrow, name), getattr(wide, name))
        seen = {}
        for forward in (narrow, wide):
            assert forward.mask is not None
            tokens, places = forward.inputs["input_ids"], forward.inputs["position_ids"]
            mask, width = forward.mask.dense()[:, 0], tokens.shape[1]
            # Of each position that is read, the tokens that it sees and where they stand.
            seen[width] = [
                (tokens[row][mask[row, at]].tolist(), places[row][mask[row, at]].tolist())
                for row, at in (divmod(i, width) for i in forward.inputs["logits_at"].tolist())
            ]
        one, other = seen.values()
        assert one == other
