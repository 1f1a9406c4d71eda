"""Slices of a corpus: some of its rows, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice

from dllm_convert.errors import DataError
from dllm_convert.recipe.splits import Rows
from dllm_convert.training.data.corpus import Corpus, Shard
from dllm_convert.training.data.file_rows import Row


def cut_out(corpus: Corpus, rows: Rows, split: str) -> Corpus:
    """Return some of the rows of a corpus.

    Files are counted for it, by reading them. The shards of a Hub dataset are not: they become one,
    whose first rows are passed over where the slice begins later.

    Args:
        corpus: The whole of it.
        rows: Which ones.
        split: What they are called.

    Raises:
        DataError: There are none, or nobody knows how many a percentage is.
    """
    if corpus.kind != "hub":
        counts = [sum(1 for _ in shard.read(0)) for shard in corpus.shards]
        total = sum(counts)
        start, stop = rows.of(total)
        end = total if stop is None else stop
        shards = tuple(_within(corpus.shards, counts, start, end))
        return _checked(replace(corpus, shards=shards), start, end, total, split)
    if rows.relative and corpus.rows is None:
        raise DataError(
            f"--data {corpus.name} does not say how many rows it has, of which {split} is a part",
            hint="Give numbers of rows, as in train[:10000]",
        )
    start, stop = rows.of(corpus.rows)
    first = corpus.shards[0] if corpus.shards else Shard(corpus.name, "row", lambda at: iter(()))
    read = partial(_chained, corpus.shards, start, stop)
    one = replace(corpus, shards=(Shard(first.name, first.unit, read, start),))
    return _checked(one, start, stop, corpus.rows, split)


def _within(shards: tuple[Shard, ...], counts: list[int], start: int, end: int) -> Iterator[Shard]:
    passed = 0
    for shard, count in zip(shards, counts, strict=True):
        low, high = max(0, start - passed), min(count, end - passed)
        if low < high:
            read = partial(_chained, (shard,), low, high)
            yield Shard(shard.name, shard.unit, read, shard.before + low)
        passed += count


def _chained(shards: tuple[Shard, ...], start: int, stop: int | None, at: int) -> Iterator[Row]:
    """Yield rows `start + at` to `stop` of shards that are read one after the other."""
    if len(shards) == 1:
        # A shard passes over rows by itself, and need not decode them.
        left = None if stop is None else max(0, stop - start - at)
        return islice(shards[0].read(start + at), left)
    return islice(chain.from_iterable(shard.read(0) for shard in shards), start + at, stop)


def _checked(corpus: Corpus, start: int, stop: int | None, total: int | None, split: str) -> Corpus:
    """Return a slice with what is known of its size.

    Raises:
        DataError: It holds nothing.
    """
    if stop is not None and start >= stop:
        of = "" if total is None else f" of its {total} rows"
        raise DataError(f"--data {corpus.name}: {split} holds none{of}", hint="Take other rows")
    if total is None or stop is None or corpus.size is None:
        return replace(corpus, size=None, rows=None if stop is None else stop - start)
    return replace(corpus, size=round(corpus.size * (stop - start) / total), rows=stop - start)
