"""Training rows of a corpus that is read while training goes on.

The stream is cut into windows: documents are read until there are enough tokens, packed among
themselves, and their rows shuffled. Which rows a window holds depends on where it begins in the
corpus and on nothing else, so a bookmark at the beginning of each window is all that a resumed
training needs; without one the stream is read again from its start, to the same rows.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from dllm_convert.errors import DataError
from dllm_convert.training.data.encoding import Encoded
from dllm_convert.training.data.packing import Layout, Packing, pack
from dllm_convert.training.data.reading import START, Position, Reader, Split, permutation
from dllm_convert.training.data.store import Store, build_row

WINDOW_TOKENS = 1 << 21
"""Tokens of a window: memory, and how far apart in the corpus two rows can be to trade places."""


@dataclass(frozen=True)
class Bookmark:
    """Where a window begins.

    Attributes:
        row: Number of its first row in the training.
        window: Number of the window.
        position: Where the corpus is read on.
    """

    row: int = 0
    window: int = 0
    position: Position = START


@dataclass(frozen=True)
class Window:
    """Documents that were packed together.

    Attributes:
        store: The documents.
        packing: The rows they make.
        after: Where the next window begins in the corpus.
    """

    store: Store
    packing: Packing
    after: Position


@dataclass(frozen=True)
class TextStream:
    """Text that is tokenised and packed while it is trained on.

    Attributes:
        reader: The corpus.
        split: Documents that are left out.
        layout: What rows look like.
        seed: Seed of the order of shards and rows.
        bookmarks: File that remembers where windows begin; None for none.
        window_tokens: Tokens of a window.
        writes: Whether this process remembers where windows begin; one of several does.
    """

    reader: Reader
    split: Split
    layout: Layout
    seed: int
    bookmarks: Path | None = None
    window_tokens: int = WINDOW_TOKENS
    writes: bool = True

    def window(self, position: Position, stop: threading.Event) -> Window:
        """Read, tokenise and pack the window that begins at a position; it ends with its epoch.

        Raises:
            DataError: If a whole epoch holds nothing to train on.
        """
        documents: list[Encoded] = []
        while not documents and not stop.is_set():
            began, tokens = position, 0
            for batch, after in self.reader.batches(position, self._order(position.epoch)):
                kept = [d for d in batch if len(d.ids) > 1 and not self.split.holds_out(d.key)]
                documents += kept
                tokens += sum(len(document.ids) for document in kept)
                position = after
                if tokens >= self.window_tokens or stop.is_set():
                    break
            if not documents and began == Position(began.epoch) and position.epoch > began.epoch:
                raise DataError(
                    f"--data {self.reader.corpus.name} holds no text to train on",
                    hint="Look at what its rows hold, or at data.held_out_fraction",
                )
        store = Store.of(documents)
        return Window(store, pack(store.lengths, store.chats, self.layout), position)

    def _order(self, epoch: int) -> list[int]:
        shards = len(self.reader.corpus.shards)
        # "The first so many documents" are to be the same ones in every epoch.
        if self.reader.data.max_documents is not None:
            return list(range(shards))
        return [int(number) for number in permutation(shards, self.seed, epoch)]

    def find(self, row: int) -> Bookmark:
        """Return the last known beginning of a window at or before a row."""
        return max(
            (known for known in self._known() if known.row <= row), key=lambda known: known.row
        )

    def _known(self) -> Iterator[Bookmark]:
        yield Bookmark()
        if self.bookmarks is None or not self.bookmarks.exists():
            return
        for line in self.bookmarks.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                position = Position(**record.pop("position"))
                yield Bookmark(**record, position=position)
            except (json.JSONDecodeError, KeyError, TypeError):
                return  # A kill left half a line; what follows it is found anew.

    def note(self, bookmark: Bookmark) -> None:
        """Remember where a window begins."""
        if self.bookmarks is None or not self.writes or bookmark == self.find(bookmark.row):
            return
        record = {**vars(bookmark), "position": bookmark.position.as_dict()}
        with self.bookmarks.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class StreamedRows(IterableDataset[dict[str, Any]]):
    """The rows of a training from a number on, without end.

    Row k is a function of the corpus, the seed and k. Several processes are fed by one of them
    (Accelerate dispatches iterable data), so they share the rows without overlap.

    Args:
        text: The stream.
        start: Rows that were trained on already.
    """

    def __init__(self, text: TextStream, start: int) -> None:
        self._text = text
        self._start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield columns of shape (length,), as `build_row` gives them."""
        if get_worker_info() is not None:
            raise ValueError("a stream reads ahead in a thread: dataloader_num_workers must be 0")
        text, stop = self._text, threading.Event()
        at = text.find(self._start)
        # The next window is tokenised while this one is trained on.
        pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        try:
            ahead = pool.submit(text.window, at.position, stop)
            while True:
                window = ahead.result()
                ahead = pool.submit(text.window, window.after, stop)
                text.note(at)
                order = permutation(window.packing.rows, text.seed, at.window)
                for row in order[max(0, self._start - at.row) :]:
                    yield build_row(window.store, window.packing, int(row), text.layout)
                at = replace(
                    at,
                    row=at.row + window.packing.rows,
                    window=at.window + 1,
                    position=window.after,
                )
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
