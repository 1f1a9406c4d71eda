"""Packing: nothing lost, nothing mixed, little padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from masks import two_stream_mask

from dllm_convert.diffusion.attention import document_mask
from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.training.data.encoding import Encoded
from dllm_convert.training.data.packing import Layout, best_fit, cut, pack
from dllm_convert.training.data.rows import collate
from dllm_convert.training.data.store import Store, StoreWriter, build_row

PLAIN = Layout(8, pad=0, fill=99)


def documents(*texts: list[int]) -> list[Encoded]:
    return [Encoded(key, np.array(ids, dtype=np.int32)) for key, ids in enumerate(texts)]


def batch(store: Store, layout: Layout) -> dict[str, torch.Tensor]:
    packing = pack(store.lengths, store.chats, layout)
    return collate([build_row(store, packing, row, layout) for row in range(packing.rows)])


def test_packing_keeps_every_token_and_separates_documents() -> None:
    texts = [list(range(10, 17)), list(range(20, 23)), list(range(30, 43)), [50], [60, 61]]
    columns = batch(Store.of(documents(*texts)), PLAIN)
    seen = []
    for row in range(len(columns["input_ids"])):
        ids, segments, positions = (
            columns[name][row] for name in ("input_ids", "segment_ids", "position_ids")
        )
        assert (ids[segments < 0] == 0).all()
        assert not columns["loss_mask"][row][segments < 0].any()
        for segment in segments[segments >= 0].unique():
            tokens = ids[segments == segment].tolist()
            assert positions[segments == segment].tolist() == list(range(len(tokens)))
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            seen += tokens
    # A piece of one token has nothing to predict: a text of one, and what is left of 13 in 8s is 5.
    assert sorted(seen) == sorted(token for text in texts for token in text if token != 50)


def test_a_piece_of_one_token_is_left_out() -> None:
    document, start, size = cut(np.array([1, 9, 8, 2, 0]), 8)
    assert list(zip(document.tolist(), start.tolist(), size.tolist(), strict=True)) == [
        (1, 0, 8),
        (2, 0, 8),
        (3, 0, 2),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_fills_rows(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(2, 300))
    sizes = generator.integers(1, capacity + 1, size=int(generator.integers(1, 500)))
    rows = best_fit(sizes, capacity)
    loads = np.bincount(rows, weights=sizes)
    assert loads.max() <= capacity
    assert (loads > 0).all()
    # First-fit and best-fit decreasing never take more than 11/9 of the best possible, plus one.
    assert len(loads) <= 11 / 9 * -(-sizes.sum() // capacity) * 1.35 + 1
    assert np.array_equal(rows, best_fit(sizes, capacity))


def test_little_padding_on_texts_of_all_lengths() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, size=5000).astype(np.int64) + 2
    packing = pack(lengths, np.zeros(5000, dtype=bool), Layout(512, 0, 0))
    assert packing.padding_share < 0.01


def test_packed_neighbours_are_invisible() -> None:
    columns = batch(Store.of(documents([1, 2, 3], [4, 5, 6, 7])), PLAIN)
    segments = columns["segment_ids"]
    assert segments.shape == (1, 8)
    text = TextBatch(columns["input_ids"], segments, columns["position_ids"])
    same = (segments[0][:, None] == segments[0][None, :]) & (segments[0] >= 0)[None, :]
    allowed = same | torch.eye(8, dtype=torch.bool)
    assert not (document_mask(segments)[0, 0] & ~allowed).any()
    two = two_stream_mask(text.blocks(2), segments)[0, 0]
    for rows in (slice(0, 8), slice(8, 16)):
        for columns_of in (slice(0, 8), slice(8, 16)):
            assert not (two[rows, columns_of] & ~allowed).any()


def chat(ids: list[int], scored: list[int]) -> Encoded:
    return Encoded(7, np.array(ids, dtype=np.int32), np.array(scored, dtype=bool))


def test_chats_are_filled_to_whole_blocks_that_nobody_scores() -> None:
    store = Store.of([chat([5, 6, 7, 8, 9], [0, 0, 0, 1, 1])])
    columns = batch(store, Layout(12, pad=0, fill=99, chat_unit=4))
    assert columns["input_ids"][0].tolist() == [5, 6, 7, 8, 9, 99, 99, 99, 0, 0, 0, 0]
    assert columns["segment_ids"][0].tolist() == [0] * 8 + [-1] * 4
    assert columns["position_ids"][0].tolist() == [*range(8), 0, 0, 0, 0]
    assert columns["loss_mask"][0].nonzero().flatten().tolist() == [3, 4]
    # The fill belongs to the block that is denoised: its tokens may be looked at.
    assert document_mask(columns["segment_ids"])[0, 0, 4, 5:8].all()
    text = batch(Store.of(documents([5, 6, 7, 8, 9])), Layout(12, 0, 99, chat_unit=4))
    assert (text["segment_ids"][0] == 0).sum() == 5


def test_supervised_padding_is_scored() -> None:
    layout = Layout(12, pad=0, fill=2, text_unit=4, chat_unit=4, fill_scored=True)
    columns = batch(Store.of([chat([5, 6, 7, 8, 2], [0, 0, 0, 1, 1])]), layout)
    assert columns["input_ids"][0].tolist() == [5, 6, 7, 8, 2, 2, 2, 2, 0, 0, 0, 0]
    assert columns["loss_mask"][0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_a_store_on_disk_is_the_one_in_memory(tmp_path: Path) -> None:
    kept = [*documents([1, 2, 0], [3]), chat([0, 6, 7], [0, 1, 0])]
    StoreWriter(tmp_path).write(iter(kept))
    for store in (Store.of(kept), Store.open(tmp_path)):
        assert store.tokens.tolist() == [1, 2, 0, 3, ~0, 6, ~7]
        assert store.lengths.tolist() == [3, 1, 3]
        assert store.chats.tolist() == [False, False, True]
        head, tail = store.cut_in_two(2)
        assert (head.lengths.tolist(), tail.start.tolist(), tail.lengths.tolist()) == (
            [2],
            [2],
            [1],
        )
    StoreWriter(tmp_path).write(iter([]))
    assert len(Store.open(tmp_path)) == 0
