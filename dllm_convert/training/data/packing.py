"""Packing: pieces of documents to rows of one length with little padding.

Best-fit decreasing (arXiv 2404.10830 packs pretraining text this way): the longest piece first,
each into the fullest row it still fits into. Pieces never see each other, so packing changes
nothing but speed; LLaDA2 finds that confining attention to the document trains best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Layout:
    """How rows look.

    Attributes:
        length: Tokens per row.
        pad: Token at a row's end; it belongs to no document.
        fill: Token that fills up a document; it belongs to it.
        text_unit: A text is filled up to a multiple of this many tokens; 1 for not at all.
        chat_unit: The same for conversations.
        fill_scored: Whether the fill is masked and scored.
    """

    length: int
    pad: int
    fill: int
    text_unit: int = 1
    chat_unit: int = 1
    fill_scored: bool = False


@dataclass(frozen=True)
class Packing:
    """Pieces of documents, sorted by the row they stand in.

    Attributes:
        document: Document of each piece, shape (pieces,).
        start: First token of each piece in its document, shape (pieces,).
        size: Tokens of each piece, shape (pieces,).
        filled: Tokens it takes in its row, fill included, shape (pieces,).
        first: First piece of each row, and the number of pieces, shape (rows + 1,).
        length: Tokens per row.
    """

    document: IntArray
    start: IntArray
    size: IntArray
    filled: IntArray
    first: IntArray
    length: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.first) - 1

    @property
    def padding_share(self) -> float:
        """Share of the rows' tokens that are no document's: padding and fill."""
        return 1 - float(self.size.sum()) / (self.rows * self.length) if self.rows else 0.0


def cut(lengths: IntArray, length: int) -> tuple[IntArray, IntArray, IntArray]:
    """Cut documents into pieces of at most `length` tokens.

    Pieces of one token have nothing to predict and are left out.

    Args:
        lengths: Tokens of each document, shape (documents,).
        length: Tokens of the longest piece.

    Returns:
        Document, first token and number of tokens of each piece, each of shape (pieces,).
    """
    counts = lengths // length + (lengths % length > 1)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)) * length
    return document, start, np.minimum(length, lengths[document] - start)


def best_fit(sizes: IntArray, capacity: int) -> IntArray:
    """Give each piece a row.

    Args:
        sizes: Tokens of each piece, at most `capacity`, shape (pieces,).
        capacity: Tokens per row.

    Returns:
        Number of each piece's row, shape (pieces,).
    """
    rows = np.zeros(len(sizes), dtype=np.int64)
    with_room: dict[int, list[int]] = {}
    rooms = 0  # Bit r is set where a row with room for r tokens is open.
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, count
            count += 1
        rows[piece] = row
        if left := room - size:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


def pack(lengths: IntArray, chats: Any, layout: Layout) -> Packing:
    """Cut documents into pieces and pack the pieces into rows.

    Args:
        lengths: Tokens of each document, shape (documents,).
        chats: Which documents are conversations, shape (documents,), bool.
        layout: Length of the rows and what is filled up.

    Returns:
        The packing; the same for the same documents.
    """
    document, start, size = cut(lengths, layout.length)
    unit = np.where(chats[document], layout.chat_unit, layout.text_unit)
    filled = np.minimum(-(-size // unit) * unit, layout.length)
    row = best_fit(filled, layout.length)
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
    return Packing(document[order], start[order], size[order], filled[order], first, layout.length)
