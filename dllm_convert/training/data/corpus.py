"""What text is read from.

A corpus is a list of shards (a file, or what a Hub dataset is stored in), and a shard is read from
any of its rows on. So a position in a corpus is two numbers, which is all that going on with an
interrupted stream takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from dllm_convert.training.data.file_rows import Row

Kind = Literal["pydoc", "files", "hub"]


@dataclass(frozen=True)
class Shard:
    """Part of a corpus that is read in one go.

    Attributes:
        name: What an error calls it.
        unit: What its rows are called: line or row.
        read: Gives the rows from a number on, in a fixed order.
        before: Rows of what it is named after that stand before its first one.
    """

    name: str
    unit: str
    read: Callable[[int], Iterator[Row]]
    before: int = 0

    def place_of(self, row: int) -> str:
        """Return what an error calls the `row`-th row, counted from 1."""
        return f"{self.name} {self.unit} {self.before + row}"


@dataclass(frozen=True)
class Corpus:
    """Text that can be read.

    Attributes:
        name: The source as it was given.
        kind: pydoc, files or hub.
        shards: Its parts, in a fixed order.
        revision: Commit of a Hub dataset.
        size: Bytes of text, if known.
        left_out: Files beside those that are read, which could be.
        rows: How many rows all shards hold, if that is known without reading them.
    """

    name: str
    kind: Kind
    shards: tuple[Shard, ...]
    revision: str | None = None
    size: int | None = None
    left_out: tuple[str, ...] = ()
    rows: int | None = None
