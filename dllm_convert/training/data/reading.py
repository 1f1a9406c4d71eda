"""Reading a corpus in batches from any position on, and which of its documents are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.content import Document, find_documents
from dllm_convert.training.data.corpus import Corpus
from dllm_convert.training.data.encoding import KEYS, Encoded, Encoder
from dllm_convert.training.data.store import Store, StoreWriter

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20


def permutation(count: int, *seed: int) -> Any:
    """Return a permutation of `range(count)` that depends on the seed only.

    It sorts raw numbers of PCG64, whose stream NumPy promises to keep, unlike that of `shuffle`.
    """
    numbers = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(numbers, kind="stable")


@dataclass(frozen=True)
class Position:
    """A place in a corpus that is read again and again.

    Attributes:
        epoch: Times it was read to its end.
        shard: Shards of this epoch that were read to their end.
        row: Rows of the next shard that were read.
        documents: Documents of this epoch that were read.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0
    documents: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the fields."""
        return asdict(self)


START = Position()


@dataclass
class Tally:
    """Counts what was read.

    Attributes:
        read: Rows of the corpus that were read.
        empty: Rows without text, or without what `data.containing` asks for.
        silent: Conversations in which the assistant says nothing, or not within the length.
        truncated: Conversations cut at the sequence's length.
        spelled: Documents that say the text of a control token, which became letters.
    """

    read: int = 0
    empty: int = 0
    silent: int = 0
    truncated: int = 0
    spelled: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts."""
        return asdict(self)


@dataclass(frozen=True)
class Split:
    """Which documents are never trained on: a matter of their content alone.

    Every copy of a document falls on the same side, in whatever order and on whatever process it is
    read.

    Attributes:
        below: Documents with a smaller key are held out.
        keys: Further keys that are held out.
    """

    below: int
    keys: frozenset[int] = frozenset()

    @classmethod
    def by_fraction(cls, fraction: float) -> Split:
        """Hold out a share of all documents."""
        return cls(int(fraction * KEYS))

    def holds_out(self, key: int) -> bool:
        """Whether the document with this key is held out."""
        return key < self.below or key in self.keys

    def mask(self, keys: Any) -> Any:
        """Return where documents are held out, shape (documents,), bool."""
        others = np.array(sorted(self.keys), dtype=np.uint64)
        return (keys < np.uint64(self.below)) | np.isin(keys, others)


@dataclass
class Need:
    """How much text is wanted on either side of the split; the rest of the corpus is not read.

    Attributes:
        split: Says on which side a document is.
        train: Tokens to train on; 0 keeps no such documents.
        held_out: Tokens to choose from for measuring; 0 keeps no such documents.
    """

    split: Split
    train: int
    held_out: int

    def __post_init__(self) -> None:
        self._left = [self.train, self.held_out]

    def takes(self, document: Encoded) -> bool:
        """Whether to keep a document; counts it."""
        side = self.split.holds_out(document.key)
        self._left[side] -= len(document.ids)
        return (self.train, self.held_out)[side] > 0

    @property
    def met(self) -> bool:
        """Whether there is enough of both."""
        return max(self._left) <= 0


@dataclass(frozen=True)
class Reader:
    """Reads and tokenises a corpus.

    Attributes:
        corpus: The text.
        data: Names of its columns, and how many documents are read at most.
        encoder: Tokenises it.
        tally: Counts what is read.
    """

    corpus: Corpus
    data: Data
    encoder: Encoder
    tally: Tally = field(default_factory=Tally)

    def batches(
        self, at: Position = START, order: Sequence[int] | None = None
    ) -> Iterator[tuple[list[Encoded], Position]]:
        """Yield tokenised documents up to the end of the epoch.

        Args:
            at: Where to begin.
            order: Order of the shards; None for that of the corpus.

        Yields:
            Documents that have tokens, and the position after them.
        """
        batch: list[Document] = []
        characters = 0
        for documents, after in self._rows(at, order):
            batch += documents
            characters += sum(len(str(document.content)) for document in documents)
            at = after
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield self._encoded(batch), at
                batch, characters = [], 0
        yield self._encoded(batch), Position(at.epoch + 1)

    def _rows(
        self, at: Position, order: Sequence[int] | None
    ) -> Iterator[tuple[list[Document], Position]]:
        shards = self.corpus.shards
        order = range(len(shards)) if order is None else order
        limit, count, start = self.data.max_documents, at.documents, at.row
        for number in islice(range(len(shards)), at.shard, None):
            shard = shards[order[number]]
            for index, row in enumerate(shard.read(start), start=start + 1):
                if limit is not None and count >= limit:
                    return
                where = shard.place_of(index)
                documents = list(find_documents(row, self.data, where))
                count += len(documents)
                self.tally.read += 1
                self.tally.empty += not documents
                yield documents, Position(at.epoch, number, index, count)
            start = 0

    def _encoded(self, batch: Sequence[Document]) -> list[Encoded]:
        encoded = self.encoder.encode(batch)
        self.tally.silent += sum(len(document.ids) == 0 for document in encoded)
        self.tally.truncated += sum(document.truncated for document in encoded)
        self.tally.spelled += sum(document.spelled for document in encoded)
        return [document for document in encoded if len(document.ids)]

    def write(self, folder: Path, need: Need, advance: Callable[[int], None]) -> Store:
        """Tokenise as many documents as are needed into a folder.

        Args:
            folder: Where to write; it must exist.
            need: Which documents are kept and when there are enough.
            advance: Told how many documents were read.

        Returns:
            What was written.
        """

        def kept() -> Iterator[Encoded]:
            for batch, _ in self.batches():
                advance(len(batch))
                yield from (document for document in batch if need.takes(document))
                if need.met:
                    return

        StoreWriter(folder).write(kept())
        return Store.open(folder)
