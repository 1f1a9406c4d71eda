"""Which files are text, by the ends of their names; whatever is not recognised is not text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from dllm_convert.errors import DataError

PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
"""Files of which each is a document."""
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt"),
    *(".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".swift", ".scala", ".lua", ".jl", ".r"),
    *(".sh", ".bash", ".sql", ".hs", ".ml", ".lean", ".f90", ".s", ".asm", ".pl", ".toml"),
    *(".ini", ".cfg", ".yaml", ".yml", ".css", ".log", ".fasta", ".fa", ".srt", ".vtt"),
)
"""The same, where they are named; a folder is not searched for them."""
ROWS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Files of rows, and what reads them."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
EXPECTED = (
    "*.txt, *.md, *.rst, *.tex, *.jsonl, *.ndjson, *.json, *.csv, *.tsv, *.parquet or *.arrow "
    "files (also .gz, .bz2, .xz, .zst), folders of them or of save_to_disk, pydoc, or a Hub "
    "dataset id"
)
_ADVICE = {
    ".pdf": "Extract its text first, for instance with pdftotext",
    ".html": "It is markup; extract its text first, for instance with pandoc -t plain",
    ".htm": "It is markup; extract its text first, for instance with pandoc -t plain",
    ".xml": "It is markup; extract its text first, for instance with pandoc -t plain",
    ".docx": "Extract its text first, for instance with pandoc -t plain",
    ".doc": "Extract its text first, for instance with pandoc -t plain",
    ".odt": "Extract its text first, for instance with pandoc -t plain",
    ".rtf": "Extract its text first, for instance with pandoc -t plain",
    ".epub": "Extract its text first, for instance with pandoc -t plain",
    ".ipynb": "Write its cells as text first, for instance with jupyter nbconvert --to markdown",
    ".xlsx": "Save it as .csv first",
    ".xls": "Save it as .csv first",
    ".zip": "Unpack it first",
    ".tar": "Unpack it first",
    ".tgz": "Unpack it first",
    ".7z": "Unpack it first",
    ".rar": "Unpack it first",
}
FILE_SUFFIXES = (*PROSE, *CODE, *ROWS, *COMPRESSED, *_ADVICE)
"""Ends of names that are a file's, not those of a dataset on the Hub."""


def bare_suffix(file: Path) -> str:
    """Suffix of a file in small letters, without that of its compression."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED else suffix


def format_of(file: Path) -> str | None:
    """Return how a file is read: text, or a format of rows; None if it is not recognised."""
    suffix = bare_suffix(file)
    return "text" if suffix in (*PROSE, *CODE) else ROWS.get(suffix)


def is_prose(file: Path) -> bool:
    """Whether a folder is searched for such a file, and it is no file of rows."""
    return bare_suffix(file) in PROSE


def unknown(file: Path) -> DataError:
    """Say that a file is not read, and what can be done about it."""
    suffix = bare_suffix(file)
    what = f"{suffix} is not among its formats" if suffix else "its name ends in no format"
    advice = _ADVICE.get(suffix, f"Rename it if it is text, as to {file.stem}.txt")
    return DataError(f"{file} is not read as text: {what}", hint=f"{advice}. Give {EXPECTED}")


_LINES_LOOKED_AT = 100
_MAGIC = (
    (b"\x1f\x8b", "compressed with gzip", ".gz"),
    (b"BZh", "compressed with bzip2", ".bz2"),
    (b"\xfd7zXZ\x00", "compressed with xz", ".xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", ".zst"),
    (b"PAR1", "a table of Parquet", ".parquet"),
)
"""How files begin that are often named as something else."""


def binary(file: Path) -> DataError:
    """Say that a file that should be text is none, and what it is if its beginning tells."""
    with file.open("rb") as opened:
        start = opened.read(8)
    for magic, what, suffix in _MAGIC:
        if start.startswith(magic) and file.suffix.lower() != suffix:
            better = file.stem + suffix if suffix == ".parquet" else file.name + suffix
            return DataError(f"{file} is {what}, not text", hint=f"Rename it to {better}")
    return DataError(f"{file} holds binary data, not text", hint=f"Give {EXPECTED}")


def check_prose(file: Path, text: str) -> None:
    """See to it that a file of prose is none of rows, whose braces and keys would be learnt.

    Args:
        file: The file.
        text: Its beginning, or all of it.

    Raises:
        DataError: It is JSON.
    """
    if not is_prose(file) or not text.lstrip().startswith(("{", "[")):
        return
    first = text.split("\n", _LINES_LOOKED_AT)[:_LINES_LOOKED_AT]
    lines = [line for line in first if line.strip()]
    if all(isinstance(_parsed(line), dict) for line in lines):
        what, suffix = "rows of JSON, one a line", ".jsonl"
    else:
        whole = _parsed(text)
        records = isinstance(whole, list) and all(isinstance(row, dict) for row in whole)
        if not whole or not (records or isinstance(whole, dict)):
            return
        what, suffix = "JSON", ".json"
    packed = file.suffix if file.suffix.lower() in COMPRESSED else ""
    stem = Path(file.stem).stem if packed else file.stem
    raise DataError(
        f"{file} holds {what}, and its name says prose: its braces and keys would be learnt",
        hint=f"Rename it to {stem}{suffix}{packed}; if they are what is to be learnt, to "
        f"{stem}.log{packed}",
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def broken_hint(name: str, form: str, error: Exception) -> str:
    """Say what to do about a file of a known format that cannot be read as one.

    Args:
        name: The file.
        form: Its format.
        error: What reading it raised.
    """
    if isinstance(error, csv.Error):
        return "Close its quotes, doubling those inside, or write the rows as .jsonl"
    if isinstance(error, json.JSONDecodeError):
        return "Correct it there, or write one object per line, to a .jsonl file"
    suffix = Path(name).suffix.lower()
    if type(error).__name__ == "BadGzipFile" or "Invalid data stream" in str(error):
        return f"If it is not compressed, rename it without {suffix}; or else fetch it again"
    if isinstance(error, PermissionError):
        return "Make it readable"
    if form in ("parquet", "arrow") or suffix in COMPRESSED:
        return "It is damaged or was cut short: fetch it again"
    return f"Give {EXPECTED}"
