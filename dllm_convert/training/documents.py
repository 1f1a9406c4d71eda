"""Where training text comes from: pydoc, files, Hub datasets. One string per document."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dllm_convert.errors import DataError, HubError
from dllm_convert.schema import Data

TEXT_SUFFIXES = (".txt", ".md")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def read_documents(data: Data) -> Iterator[str]:
    """Yield documents in a fixed order.

    Args:
        data: `source` is `pydoc` (the language reference shipped with CPython), files or globs
            separated by commas (`*.txt *.md *.jsonl *.parquet`), or a Hub dataset id.

    Raises:
        DataError: If a file is missing, binary, broken or lacks the text field.
        HubError: If a Hub dataset cannot be reached.
    """
    if data.source == "pydoc":
        return _pydoc()
    files = _files(data.source)
    if files:
        return (
            text for file in files for text in _read_file(file, data.text_field) if text.strip()
        )
    if any(data.source.endswith(suffix) for suffix in FILE_SUFFIXES) or data.source.startswith(
        (".", "/")
    ):
        raise DataError(
            f"no file matches --data {data.source}",
            hint="Give *.txt, *.md, *.jsonl or *.parquet files, pydoc, or a Hub dataset id",
        )
    return _hub_dataset(data)


def kind_of(source: str) -> Literal["pydoc", "files", "hub"]:
    """Return what a `data.source` that could be read stands for, by the rules of its reading."""
    if source == "pydoc":
        return "pydoc"
    return "files" if _files(source) else "hub"


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _files(source: str) -> list[Path]:
    found: list[Path] = []
    for pattern in source.split(","):
        matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        for match in map(Path, matches):
            inside = sorted(match.rglob("*")) if match.is_dir() else [match]
            found += [
                file
                for file in inside
                if file.is_file() and (file.suffix in FILE_SUFFIXES or file == match)
            ]
    return found


def _read_file(file: Path, text_field: str) -> Iterator[str]:
    if file.suffix == ".parquet":
        yield from _read_parquet(file, text_field)
        return
    raw = file.read_bytes()
    if b"\0" in raw[:65536]:
        raise DataError(
            f"{file} holds binary data, not text", hint="Give .txt, .md, .jsonl or .parquet files"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x})",
            hint="Convert it to UTF-8 first",
        ) from error
    if file.suffix == ".jsonl":
        yield from _read_jsonl(file, text, text_field)
    else:
        yield text


def _read_jsonl(file: Path, text: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file} line {number} is not JSON ({error.msg} at column {error.colno})",
                hint="Every line must be one JSON object",
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{file} line {number} has no text under {text_field!r}, it has {keys}",
                hint="Name the right key with --set data.text_field=KEY",
            )
        yield record[text_field]


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise DataError(
                f"{file} has no column {text_field!r}, it has {table.schema_arrow.names}",
                hint="Name the right column with --set data.text_field=COLUMN",
            )
        for batch in table.iter_batches(columns=[text_field]):
            yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a readable parquet file ({error})") from error


def _hub_dataset(data: Data) -> Iterator[str]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = datasets.load_dataset(data.source, split=data.split, streaming=True)
        for row in rows:
            text = row.get(data.text_field)
            if not isinstance(text, str):
                raise DataError(
                    f"dataset {data.source} has no text under {data.text_field!r}, "
                    f"it has {sorted(row)}",
                    hint="Name the right column with --set data.text_field=COLUMN",
                )
            yield text
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise HubError(
            f"no dataset {data.source!r} could be read from the Hub "
            f"({type(error).__name__}: {reason})",
            hint="Check the id and the network, or train on files: --data 'texts/*.txt'",
        ) from error
