"""Where training text comes from: pydoc, files, Hub datasets, read through `datasets`."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Data
from dllm_convert.recipe.splits import sliced
from dllm_convert.training.data.corpus import Corpus, Shard
from dllm_convert.training.data.file_rows import Row, explained, reader_of
from dllm_convert.training.data.files import find_files
from dllm_convert.training.data.formats import EXPECTED, FILE_SUFFIXES, broken_hint, format_of
from dllm_convert.training.data.slices import cut_out

ROWS_AT_ONCE = 64


def open_corpus(data: Data) -> Corpus:
    """Find the text; nothing of it is read yet, but where the rows of files have to be counted.

    Args:
        data: `source` is `pydoc` (the language reference shipped with CPython), files, folders or
            globs separated by commas, or a Hub dataset id; `split` may be a slice.

    Raises:
        DataError: If no such file exists, it is none that can be read, or the slice holds nothing.
        HubError: If a Hub dataset cannot be reached or has no such subset or split.
    """
    split, rows = sliced(data.split)
    corpus = _open(data.model_copy(update={"split": split}))
    return corpus if rows is None else cut_out(corpus, rows, data.split)


def _open(data: Data) -> Corpus:
    if data.source == "pydoc":
        return Corpus("pydoc", "pydoc", (Shard("pydoc", "row", _pydoc),))
    found = find_files(data.source, data.split)
    if found is not None:
        # An empty file is nothing to read; the library stumbles over those of some formats.
        files = [file for file in found.files if file.is_dir() or file.stat().st_size]
        shards = tuple(shard for file in files for shard in _shards(file, data))
        size = sum(file.stat().st_size for file in files if file.is_file())
        return Corpus(data.source, "files", shards, size=size, left_out=found.left_out)
    if data.source.lower().endswith(FILE_SUFFIXES) or data.source.startswith((".", "/", "~")):
        raise DataError(f"no file matches --data {data.source}", hint=f"Give {EXPECTED}")
    from dllm_convert.training.data.hub_dataset import open_hub_dataset

    return open_hub_dataset(data)


def no_text(source: str) -> DataError:
    """Return the error for data that is there and says nothing.

    Args:
        source: The data, as they were named.
    """
    return DataError(
        f"--data {source} holds no text", hint="Give files with at least one paragraph"
    )


def dataset_rows(dataset: Any, start: int) -> Iterator[Row]:
    """Yield the rows of a `datasets.IterableDataset` from `start` on."""
    for batch in (dataset.skip(start) if start else dataset).iter(batch_size=ROWS_AT_ONCE):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _pydoc(start: int) -> Iterator[Row]:
    from pydoc_data.topics import topics

    for name in sorted(topics)[start:]:
        yield {"text": topics[name]}


def _shards(file: Path, data: Data) -> Iterator[Shard]:
    """Return what reads a file or a saved dataset."""
    form = "saved" if file.is_dir() else format_of(file) or "text"
    if form not in ("saved", "parquet", "arrow"):
        unit = "line" if form == "jsonl" else "row"
        yield Shard(str(file), unit, reader_of(form, file, data.text_field))
        return
    yield Shard(str(file), "row", partial(_table_rows, form, file))


def _table_rows(form: str, file: Path, start: int) -> Iterator[Row]:
    import datasets
    import pyarrow as pa

    try:
        with explained(str(file), "what save_to_disk writes" if form == "saved" else form):
            if form == "saved":
                dataset = datasets.load_from_disk(str(file))
                yield from dataset_rows(dataset.to_iterable_dataset(), start)
                return
            dataset = datasets.load_dataset(
                form, data_files=glob.escape(str(file.resolve())), split="train", streaming=True
            )
            yield from dataset_rows(dataset, start)
    except pa.ArrowException as error:
        raise DataError(
            f"{file} cannot be read as {form} ({next(iter(str(error).splitlines()), '')})",
            hint=broken_hint(str(file), form, error),
        ) from error
