"""Rows of one file, from any of them on: text, JSON lines, JSON and tables with a separator."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dllm_convert.errors import DataError
from dllm_convert.training.data.formats import binary, broken_hint, check_prose

Row = Mapping[str, Any] | None
"""Columns of a record; None stands for an empty line."""

LARGE_TEXT = 64 << 20
"""Characters above which a text file is read in parts instead of as one document."""
PART_CHARACTERS = 1 << 20
"""Characters of such a part, to the end of the line."""
LINE_AT_MOST = 128 << 20
"""Characters of the longest line of JSON, and of the longest field of a table."""
JSON_AT_MOST = 1 << 30
"""Bytes of the largest file of JSON: it is read as a whole."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def reader_of(form: str, file: Path, text_field: str) -> Callable[[int], Iterator[Row]]:
    """Return what reads a file from one of its rows on.

    Args:
        form: text, jsonl, json, csv or tsv.
        file: The file.
        text_field: What the one column of a text is called.
    """
    rows = {
        "text": partial(_texts, file, text_field),
        "jsonl": partial(_json_lines, file),
        "json": partial(_json, file, text_field),
        "csv": partial(_table, file, ","),
        "tsv": partial(_table, file, "\t"),
    }[form]
    return partial(_explained, form, file, rows)


def _explained(
    form: str, file: Path, rows: Callable[[int], Iterator[Row]], start: int
) -> Iterator[Row]:
    with explained(str(file), form):
        try:
            yield from rows(start)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 text (0x{error.object[error.start]:02x} after "
                f"{_before_the_fault(file)!r})",
                hint="Convert it to UTF-8 first, for instance with iconv",
            ) from error


def _before_the_fault(file: Path) -> str:
    """Return the last characters before the first bytes that are none."""
    before = ""
    with _opened(file, errors="replace") as text:
        while chunk := text.read(1 << 16):
            good, fault, _ = chunk.partition("\ufffd")
            before = (before + good)[-20:]
            if fault:
                break
    return before


@contextmanager
def explained(name: str, form: str) -> Iterator[None]:
    """Turn what reading a local file raises into a DataError that names it."""
    import zlib

    try:
        yield
    except (
        *(ValueError, OSError, EOFError, RecursionError, csv.Error),
        *(zlib.error, lzma.LZMAError),
    ) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"{name} cannot be read as {form} ({reason})",
            hint=broken_hint(name, form, error),
        ) from error


@contextmanager
def _opened(file: Path, *, newline: str | None = None, errors: str = "strict") -> Iterator[IO[str]]:
    """Open a file as text: packed or not, in UTF-8 or in what a byte order mark says."""
    with file.open("rb") as raw, _unpacked(raw, file) as packed:
        buffered = io.BufferedReader(packed)
        start = buffered.peek(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")
        if encoding == "utf-8-sig" and b"\0" in start:
            raise binary(file)
        with io.TextIOWrapper(buffered, encoding=encoding, errors=errors, newline=newline) as text:
            yield text


def _unpacked(raw: IO[bytes], file: Path) -> Any:
    match file.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".bz2":
            return bz2.BZ2File(raw)
        case ".xz":
            return lzma.LZMAFile(raw)
        case ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise DataError(
                    f"{file} is compressed with Zstandard, which this Python does not read",
                    hint="pip install zstandard, or unpack it with unzstd",
                ) from error
            return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return raw


def _texts(file: Path, text_field: str, start: int) -> Iterator[Row]:
    for part in islice(_parts(file), start, None):
        yield {text_field: part}


def _parts(file: Path) -> Iterator[str]:
    """Yield a text as a whole, or in parts that end with a line if it is too large."""
    with _opened(file) as text:
        rest = text.read(min(LARGE_TEXT, 1 << 16))
        _check_text(rest, file)
        rest += text.read(LARGE_TEXT + 1 - len(rest))
        check_prose(file, rest)
        if len(rest) <= LARGE_TEXT:
            if rest:
                yield rest
            return
        while rest:
            end = rest.find("\n", PART_CHARACTERS - 1) + 1
            if not end and len(rest) < 2 * PART_CHARACTERS:
                more = text.read(PART_CHARACTERS)
                rest += more
                if more:
                    continue
                end = len(rest)
            end = end if 0 < end <= 2 * PART_CHARACTERS else min(len(rest), PART_CHARACTERS)
            _check_text(rest[:end], file)
            yield rest[:end]
            rest = rest[end:]


def _check_text(text: str, file: Path) -> None:
    if "\0" in text[:65536]:
        raise binary(file)


def _lines(text: IO[str], file: Path) -> Iterator[str]:
    """Yield the lines of a file, of bounded length."""
    number = 0
    while line := text.readline(LINE_AT_MOST + 1):
        number += 1
        if len(line) > LINE_AT_MOST:
            raise DataError(
                f"{file} line {number} is longer than {LINE_AT_MOST >> 20} million characters",
                hint="Every line has to fit into memory: cut its text into several rows",
            )
        yield line


def _json_lines(file: Path, start: int) -> Iterator[Row]:
    with _opened(file) as text:
        for number, line in islice(enumerate(_lines(text, file), 1), start, None):
            yield _record(line.lstrip("\ufeff"), f"{file} line {number}")


def _record(line: str, where: str) -> Row:
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg} at column {error.colno})",
            hint="Every line must be one JSON object",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON that can be read ({error})") from error
    if not isinstance(record, dict):
        whole = (
            "If the file is one list of rows, name it .json. " if isinstance(record, list) else ""
        )
        raise DataError(
            f"{where} is a JSON {type(record).__name__}, expected an object",
            hint=whole + 'Every line must be one JSON object, such as {"text": "..."}',
        )
    return record


def _json(file: Path, text_field: str, start: int) -> Iterator[Row]:
    """Read a list of rows, an object of columns, one row, or lines of JSON after all."""
    with _opened(file) as text:
        size = file.stat().st_size
        content = text.read(JSON_AT_MOST + 1) if size <= JSON_AT_MOST else ""
        if size > JSON_AT_MOST or len(content) > JSON_AT_MOST:
            raise DataError(
                f"{file} is larger than {JSON_AT_MOST >> 30} GiB, and JSON is read as a whole",
                hint="Write one object per line, to a .jsonl file",
            )
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _json_lines(file, start)
        return
    for number, row in islice(enumerate(_rows_of(value, file), 1), start, None):
        if isinstance(row, str):
            yield {text_field: row}
        elif row is None or isinstance(row, dict):
            yield row
        else:
            raise DataError(
                f"{file} row {number} is a JSON {type(row).__name__}, expected an object",
                hint='Every element must be one JSON object, such as {"text": "..."}',
            )


def _rows_of(value: Any, file: Path) -> Iterator[Any]:
    if isinstance(value, list):
        yield from value
    elif isinstance(value, dict) and _is_columns(value):
        for values in zip(*value.values(), strict=True):
            yield dict(zip(value, values, strict=True))
    elif isinstance(value, dict):
        inside = [v for v in value.values() if _is_records(v)]
        yield from inside[0] if len(inside) == 1 and not _is_turns(inside[0]) else [value]
    else:
        raise DataError(
            f"{file} is a JSON {type(value).__name__}, expected a list of rows",
            hint='Give rows, as in [{"text": "..."}], or columns, as in {"text": ["..."]}',
        )


def _is_columns(value: Mapping[str, Any]) -> bool:
    lists = [v for v in value.values() if isinstance(v, list)]
    same = len({len(v) for v in lists}) == 1
    return bool(value) and len(lists) == len(value) and same and not any(map(_is_records, lists))


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_turns(records: Sequence[Mapping[str, Any]]) -> bool:
    return all("role" in record or "from" in record for record in records)


def _table(file: Path, separator: str, start: int) -> Iterator[Row]:
    csv.field_size_limit(LINE_AT_MOST)
    with _opened(file, newline="") as text:
        reader = csv.reader(_lines(text, file), delimiter=_separator(file, separator), strict=True)
        names = next(reader, [])
        if len({*names}) < len(names):
            raise DataError(
                f"{file} names a column twice in its first line: {names}",
                hint="The first line of a table names its columns",
            )
        for number, values in islice(enumerate(reader, 1), start, None):
            if not values:
                yield None
                continue
            if len(values) != len(names):
                raise DataError(
                    f"{file} row {number} (line {reader.line_num}) has {len(values)} fields, "
                    f"expected {len(names)}: {', '.join(names)}",
                    hint="Quote fields that hold the separator, or write the rows as .jsonl",
                )
            yield dict(zip(names, values, strict=True))


def _separator(file: Path, separator: str) -> str:
    """Return what separates the first line: programs of some countries write semicolons."""
    with _opened(file, newline="") as text:
        line = next(_lines(text, file), "")
    others = [mark for mark in ("\t", ";") if mark in line]
    return others[0] if separator == "," and separator not in line and others else separator
