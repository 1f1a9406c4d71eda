"""Where training text comes from: pydoc, files, Hub datasets, read through `datasets`.

A corpus is a list of shards (a file, or what a Hub dataset is stored in), and a shard is read from
any of its rows on. So a position in a corpus is two numbers, which is all that going on with an
interrupted stream takes.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

from dllm_convert.errors import DataError
from dllm_convert.schema import Data

Kind = Literal["pydoc", "files", "hub"]
Row = Mapping[str, Any] | None
"""Columns of a record; None stands for an empty line."""

TEXT_SUFFIXES = (".txt", ".md")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet", *COMPRESSED_SUFFIXES)
LARGE_TEXT = 64 << 20
"""Bytes above which a text file is read in parts instead of as one document."""
PART_CHARACTERS = 1 << 20
"""Characters of such a part, to the end of the line."""
ROWS_AT_ONCE = 64
EXPECTED = "*.txt, *.md, *.jsonl, *.json or *.parquet files (also .gz), pydoc, or a Hub dataset id"


@dataclass(frozen=True)
class Shard:
    """Part of a corpus that is read in one go.

    Attributes:
        name: What an error calls it.
        unit: What its rows are called: line or row.
        read: Gives the rows from a number on, in a fixed order.
    """

    name: str
    unit: str
    read: Callable[[int], Iterator[Row]]


@dataclass(frozen=True)
class Corpus:
    """Text that can be read.

    Attributes:
        name: The source as it was given.
        kind: pydoc, files or hub.
        shards: Its parts, in a fixed order.
        revision: Commit of a Hub dataset.
        size: Bytes of text, if known.
    """

    name: str
    kind: Kind
    shards: tuple[Shard, ...]
    revision: str | None = None
    size: int | None = None


def open_corpus(data: Data) -> Corpus:
    """Find the text; nothing of it is read yet.

    Args:
        data: `source` is `pydoc` (the language reference shipped with CPython), files, folders or
            globs separated by commas, or a Hub dataset id.

    Raises:
        DataError: If no such file exists.
        HubError: If a Hub dataset cannot be reached or has no such subset or split.
    """
    if data.source == "pydoc":
        return Corpus("pydoc", "pydoc", (Shard("pydoc", "row", _pydoc),))
    files = _files(data.source)
    if files:
        # An empty file is nothing to read; the library stumbles over those of some formats.
        files = [file for file in files if file.stat().st_size]
        groups = groupby(files, _format)
        shards = [s for builder, group in groups for s in _shards(builder, [*group], data)]
        return Corpus(
            data.source, "files", tuple(shards), size=sum(file.stat().st_size for file in files)
        )
    if data.source.endswith(FILE_SUFFIXES) or data.source.startswith((".", "/")):
        raise DataError(f"no file matches --data {data.source}", hint=f"Give {EXPECTED}")
    from dllm_convert.training.hub_dataset import open_hub_dataset

    return open_hub_dataset(data)


def kind_of(source: str) -> Kind:
    """Return what a `data.source` that could be read stands for, by the rules of its reading."""
    if source == "pydoc":
        return "pydoc"
    return "files" if _files(source) else "hub"


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


def _bare(file: Path) -> str:
    """Suffix of a file without that of its compression."""
    compressed = file.suffix in COMPRESSED_SUFFIXES
    return Path(file.stem).suffix if compressed else file.suffix


def _files(source: str) -> list[Path]:
    found: list[Path] = []
    for pattern in source.split(","):
        matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        for match in map(Path, matches):
            inside = sorted(_visible(match)) if match.is_dir() else [match]
            found += [
                file
                for file in inside
                if file.is_file() and (_bare(file) in FILE_SUFFIXES or file == match)
            ]
    return found


def _visible(folder: Path) -> Iterator[Path]:
    """Yield what lies below a folder, but for what is hidden, such as .git or a run's .work."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _format(file: Path) -> str:
    """Which of `datasets`' builders reads a file, and how."""
    suffix = _bare(file)
    if suffix in (".jsonl", ".json", ".parquet"):
        return suffix[1:]
    return "lines" if file.stat().st_size > LARGE_TEXT else "text"


_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {"sample_by": "document"}),
    "lines": ("text", {"sample_by": "line", "keep_linebreaks": True}),
    "jsonl": ("text", {"sample_by": "line"}),
}


def _shards(form: str, files: list[Path], data: Data) -> Iterator[Shard]:
    """Read files of one format, each as a shard."""
    import datasets

    # The JSON builder wants every line of every file to have the same keys; lines of text do not.
    builder, options = _BUILDERS.get(form, (form, {}))
    paths = [glob.escape(str(file.resolve())) for file in files]
    name = str(files[0]) if len(files) == 1 else f"a file of {data.source}"
    with explained(name, builder):
        dataset = datasets.load_dataset(
            builder, data_files=paths, split="train", streaming=True, **options
        )
    convert = {"jsonl": _json_lines, "lines": _parts, "text": _checked}.get(form)
    for number, file in enumerate(files):
        part = partial(dataset.shard, num_shards=len(files), index=number)
        unit = "line" if form == "jsonl" else "row"
        yield Shard(str(file), unit, partial(_read, part, str(file), builder, convert, data))


def _read(
    part: Callable[[], Any],
    name: str,
    builder: str,
    convert: Callable[[Iterator[Row], str, int], Iterator[Row]] | None,
    data: Data,
    start: int,
) -> Iterator[Row]:
    with explained(name, builder):
        if convert is _parts:
            parts = _parts(dataset_rows(part(), 0), name, 0)
            rows: Iterator[Row] = islice(parts, start, None)
        else:
            rows = dataset_rows(part(), start)
            rows = convert(rows, name, start) if convert else rows
        for row in rows:
            # The text builder calls its one column `text`, whatever the recipe calls it.
            whole = builder == "text" and convert is not _json_lines
            yield {data.text_field: row["text"]} if whole and row else row


def _checked(rows: Iterator[Row], name: str, start: int) -> Iterator[Row]:
    for row in rows:
        if row and "\0" in row["text"][:65536]:
            raise DataError(
                f"{name} holds binary data, not text",
                hint="Give .txt, .md, .jsonl, .json or .parquet files",
            )
        yield row


def _parts(rows: Iterator[Row], name: str, start: int) -> Iterator[Row]:
    """Join the lines of a large file to parts that fit into memory."""
    lines: list[str] = []
    characters = 0
    for row in _checked(rows, name, start):
        lines.append(row["text"] if row else "")
        characters += len(lines[-1])
        if characters >= PART_CHARACTERS:
            yield {"text": "".join(lines)}
            lines, characters = [], 0
    if lines:
        yield {"text": "".join(lines)}


def _json_lines(rows: Iterator[Row], name: str, start: int) -> Iterator[Row]:
    for number, row in enumerate(rows, start=start + 1):
        line = row["text"] if row else ""
        if not line.strip():
            yield None
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name} line {number} is not JSON ({error.msg} at column {error.colno})",
                hint="Every line must be one JSON object",
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{name} line {number} is a JSON {type(record).__name__}, expected an object",
                hint='Every line must be one JSON object, such as {"text": "..."}',
            )
        yield record


@contextmanager
def explained(name: str, form: str) -> Iterator[None]:
    """Turn what reading a local file raises into a DataError that names it."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError as error:
        before = error.object[max(0, error.start - 20) : error.start].decode(errors="replace")
        raise DataError(
            f"{name} is not UTF-8 text (0x{error.object[error.start]:02x} after {before!r})",
            hint="Convert it to UTF-8 first, for instance with iconv",
        ) from error
    except (pa.ArrowException, ValueError, OSError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"{name} cannot be read as {form} ({reason})",
            hint=f"Give {EXPECTED}",
        ) from error
