"""The two forwards beside a kept base: who sees whom, in the forms that attention takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from dllm_convert.common.terms import Draft
from dllm_convert.diffusion.attention import TILE
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.gated import predict_beside_base
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.streams import WIDTH_MULTIPLE

SIZE, MASK = 8, 99


def texts(rows: int, length: int, seed: int) -> TextBatch:
    """Rows of documents of any length, some with padding, some scored in part."""
    draws = torch.Generator().manual_seed(seed)
    segments, positions = [], []
    for _ in range(rows):
        owners: list[int] = []
        places: list[int] = []
        number = 0
        while len(owners) < length:
            size = int(torch.randint(1, length, (1,), generator=draws))
            owners += [number] * size
            places += range(size)
            number += 1
        padding = int(torch.randint(0, length // 4, (1,), generator=draws))
        owner = torch.tensor(owners[:length])
        owner[length - padding :] = -1
        segments.append(owner)
        positions.append(torch.tensor(places[:length]))
    loss = torch.rand(rows, length, generator=draws) < 0.8
    tokens = torch.randint(0, MASK, (rows, length), generator=draws)
    return TextBatch(tokens, torch.stack(segments), torch.stack(positions), loss)


DRAFTS: tuple[Draft, ...] = ("open", "causal")


def objective(draft: Draft = "open") -> Objective:
    return Objective(
        "bd3lm", MASK, token_shift=True, block_size=SIZE, context="causal", acts_on="noisy",
        draft=draft,
    )  # fmt: skip


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("multiple", [WIDTH_MULTIPLE, TILE])
@pytest.mark.parametrize("seed", range(6))
def test_who_sees_whom(seed: int, multiple: int, draft: Draft) -> None:
    """Against the rule, written out here once more from where each column stands in the text."""
    batch = texts(2, 60, seed)
    views = corrupt(
        batch, objective(), ForwardProcess(draw="count", complementary=True), NoiseKey(0, 0, 0, 2)
    )
    reading, forward = predict_beside_base(batch, views, objective(draft), multiple=multiple)
    mask = forward.mask
    assert mask is not None
    stream, owner, place = mask.streams, mask.segments, mask.positions
    block = place // SIZE
    real = (stream >= 0) & (owner >= 0)
    same = (owner[:, :, None] == owner[:, None]) & real[:, None]
    clean = stream == 0
    own = (stream[:, :, None] == stream[:, None]) & (block[:, :, None] == block[:, None])
    if draft == "causal":
        own &= place[:, None] <= place[:, :, None]
    before = clean[:, None] & (block[:, None] < block[:, :, None])
    causal = clean[:, None] & (place[:, None] <= place[:, :, None])
    expected = same & torch.where(clean[:, :, None], causal, own | before)
    read = forward.read
    dense = forward.dense_mask()
    assert dense is not None
    found = dense[:, 0]
    assert found.shape == (2, forward.inputs["input_ids"].shape[1], stream.shape[1])
    queries = real[:, read:]
    assert torch.equal(found[queries], expected[:, read:][queries])
    clean_found = reading.dense_mask()[:, 0]
    rows = real[:, :read]
    assert torch.equal(clean_found[rows], expected[:, :read, :read][rows])
    # What is predicted is what the text says, behind the token before it.
    flat = forward.inputs["logits_at"]
    row, column = flat // forward.inputs["input_ids"].shape[1], flat % found.shape[1]
    at = place[row, column + read]
    assert ((at + 1) % SIZE != 0).all()
    assert torch.equal(forward.rows, row)
    for index in range(len(flat)):
        inside = batch.segments[row[index]] == owner[row[index], column[index] + read]
        text = batch.tokens[row[index]][inside]
        assert text[at[index] + 1] == forward.targets[index]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_reads_the_same_mask(seed: int, draft: Draft) -> None:
    batch = texts(2, 200, seed)
    process = ForwardProcess(draw="count", complementary=True)
    views = corrupt(batch, objective(), process, NoiseKey(0, 0, 0, 2))
    reading, forward = predict_beside_base(batch, views, objective(draft), multiple=TILE)
    for one in (forward, reading):
        dense = one.dense_mask()
        assert dense is not None
        blocks = one.block_mask()
        queries, keys = dense.shape[-2:]
        assert blocks.seq_lengths == (queries, keys)
        index = torch.arange(keys)
        for row in range(2):
            at = torch.tensor(row)
            rule = blocks.mask_mod(at, at * 0, index[:queries, None], index[None])
            assert torch.equal(rule, dense[row, 0])
        draws = torch.Generator().manual_seed(seed)
        q = torch.randn(2, 2, queries, 16, generator=draws)
        k, v = (torch.randn(2, 2, keys, 16, generator=draws) for _ in range(2))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
        found = flex_attention(q, k, v, block_mask=blocks)
        # A tile that nobody sees into is skipped, and one that is open is not looked up.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_noisy_views_alone_run() -> None:
    batch = texts(2, 64, 0)
    process = ForwardProcess(draw="count", complementary=True)
    views = corrupt(batch, objective(), process, NoiseKey(0, 0, 0, 2))
    reading, forward = predict_beside_base(batch, views, objective())
    assert forward.inputs["noisy"].all()
    assert forward.inputs["noisy"].shape == forward.inputs["input_ids"].shape
    assert reading.inputs["input_ids"].shape[1] <= 64
    assert not (reading.inputs["input_ids"] == MASK).any()
    first = batch.scorable & (batch.positions % SIZE == 0)
    assert len(reading.targets) == int(first.sum())
    learnt = sum(int((view.scored & ~first).sum()) for view in views)
    assert len(forward.targets) == learnt
    row, at = first.nonzero(as_tuple=True)
    assert torch.equal(reading.targets, batch.tokens[row, at])
