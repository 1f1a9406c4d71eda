"""Tokenised documents in memory or in a file, and the rows they make."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dllm_convert.training.data.encoding import Encoded
from dllm_convert.training.data.packing import IntArray, Layout, Packing

TOKENS, INDEX = "tokens.bin", "documents.npz"


def stored(encoded: Encoded) -> Any:
    """Token ids as they are kept: `~id` where a token is not scored."""
    return (
        encoded.ids
        if encoded.scored is None
        else np.where(encoded.scored, encoded.ids, ~encoded.ids)
    )


@dataclass(frozen=True)
class Store:
    """Documents as ranges of one long array.

    Attributes:
        tokens: `stored` tokens of all documents, shape (tokens,), int32, possibly on disk.
        start: First token of each document, shape (documents,).
        lengths: Tokens of each document, shape (documents,).
        keys: Hash of each document's content, shape (documents,), uint64.
        chats: Which documents are conversations, shape (documents,), bool.
    """

    tokens: Any
    start: IntArray
    lengths: IntArray
    keys: Any
    chats: Any

    @classmethod
    def of(cls, documents: Sequence[Encoded]) -> Store:
        """Keep documents in memory."""
        tokens = [stored(document) for document in documents]
        return cls._indexed(
            np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int32),
            np.array([len(part) for part in tokens], dtype=np.int64),
            np.array([document.key for document in documents], dtype=np.uint64),
            np.array([document.scored is not None for document in documents], dtype=np.bool_),
        )

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Map what a `StoreWriter` wrote; tokens stay on disk until they are used."""
        path = folder / TOKENS
        with np.load(folder / INDEX) as index:
            lengths, keys, chats = index["lengths"], index["keys"], index["chats"]
        empty = np.zeros(0, dtype=np.int32)
        tokens = np.memmap(path, dtype="<i4", mode="r") if path.stat().st_size else empty
        return cls._indexed(tokens, lengths, keys, chats)

    @classmethod
    def _indexed(cls, tokens: Any, lengths: IntArray, keys: Any, chats: Any) -> Store:
        return cls(tokens, lengths.cumsum() - lengths, lengths, keys, chats)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def size(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def choose(self, documents: Any) -> Store:
        """Return some of the documents, by index or mask, over the same tokens."""
        return replace(
            self,
            start=self.start[documents],
            lengths=self.lengths[documents],
            keys=self.keys[documents],
            chats=self.chats[documents],
        )

    def cut_in_two(self, at: int) -> tuple[Store, Store]:
        """Return the first document up to a token and from that token on."""
        whole = self.choose([0])
        rest = whole.lengths - at
        return (
            replace(whole, lengths=whole.lengths - rest),
            replace(whole, start=whole.start + at, lengths=rest),
        )


class StoreWriter:
    """Writes documents to a folder that `Store.open` maps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lengths, self._keys, self._chats = array("q"), array("Q"), array("b")

    def write(self, documents: Iterable[Encoded]) -> None:
        """Write all documents; call once."""
        with (self._folder / TOKENS).open("wb") as file:
            for document in documents:
                file.write(stored(document).astype("<i4").tobytes())
                self._lengths.append(len(document.ids))
                self._keys.append(document.key)
                self._chats.append(document.scored is not None)
        np.savez(
            self._folder / INDEX,
            lengths=np.array(self._lengths, dtype=np.int64),
            keys=np.array(self._keys, dtype=np.uint64),
            chats=np.array(self._chats, dtype=np.bool_),
        )


def build_row(store: Store, packing: Packing, row: int, layout: Layout) -> dict[str, Any]:
    """Put a row together.

    Args:
        store: The documents that were packed.
        packing: Where their pieces stand.
        row: Number of the row.
        layout: Padding and fill.

    Returns:
        Arrays of shape (length,): `input_ids`; `segment_ids`, the document numbered within the row,
        -1 at padding; `position_ids`, from 0 in each document; `loss_mask`, True where a token may
        be masked and scored.
    """
    length = packing.length
    ids = np.full(length, layout.pad, dtype=np.int64)
    segments = np.full(length, -1, dtype=np.int64)
    positions = np.zeros(length, dtype=np.int64)
    loss = np.zeros(length, dtype=np.bool_)
    at = 0
    pieces = range(int(packing.first[row]), int(packing.first[row + 1]))
    for segment, piece in enumerate(pieces):
        size, filled = int(packing.size[piece]), int(packing.filled[piece])
        start = int(store.start[packing.document[piece]] + packing.start[piece])
        tokens = np.asarray(store.tokens[start : start + size])
        ids[at : at + size] = np.where(tokens < 0, ~tokens, tokens)
        loss[at : at + size] = tokens >= 0
        ids[at + size : at + filled] = layout.fill
        loss[at + size : at + filled] = layout.fill_scored
        segments[at : at + filled] = segment
        positions[at : at + filled] = np.arange(filled)
        at += filled
    return {"input_ids": ids, "segment_ids": segments, "position_ids": positions, "loss_mask": loss}
