"""Read JSON that somebody else wrote: bounded, and with errors that name the file."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from dllm_convert.common import strict_json
from dllm_convert.common.disk import write_whole
from dllm_convert.common.foreign_files import MAX_VOCABULARY_BYTES, read_bytes
from dllm_convert.errors import DataError

DOWNLOAD_AGAIN = "Download the file again, or ask whoever made it for a complete copy"
_MAX_FOUND = 300
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that git wrote in the place of a large one."""


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-LFS left in the place of a large one."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def pointer(file: str) -> DataError:
    """Return the error for a file that git-LFS did not fetch."""
    return DataError(
        f"{file} is a git-LFS pointer: the file itself was not downloaded",
        hint="Run `git lfs pull` in its folder, or download it again with `hf download`",
    )


class DuplicateKeyError(ValueError):
    """An object names a key twice."""


def broken(file: str, found: str, expected: str) -> DataError:
    """Return the error for a file that is not what its format allows."""
    found = found if len(found) <= _MAX_FOUND else f"{found[:_MAX_FOUND]}…"
    return DataError(f"{file}: {found}, expected {expected}", hint=DOWNLOAD_AGAIN)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, as an `object_pairs_hook`.

    Raises:
        DuplicateKeyError: A key is there twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise DuplicateKeyError(ascii(twice)[:200])
    return result


def load_json(path: Path, *, distinct: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        distinct: Whether a key that an object has twice is an error.

    Raises:
        DataError: The file cannot be read, is too large or is not JSON.
    """
    try:
        raw = read_bytes(path, MAX_VOCABULARY_BYTES)
        if raw.startswith(LFS_POINTER):
            raise pointer(path.name)
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique if distinct else None)
        if _SURROGATE.search(raw):
            # A pair is one character; half of one cannot be written anywhere again.
            strict_json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except DuplicateKeyError as error:
        raise broken(path.name, f"{error} is named twice", "every name once") from error
    except (ValueError, RecursionError) as error:
        raise broken(path.name, f"not valid JSON ({error})", "a JSON document in UTF-8") from error


def load_json_object(path: Path, *, distinct: bool = False) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Args:
        path: The file.
        distinct: Whether a key that an object has twice is an error.

    Raises:
        DataError: The file cannot be read, is not JSON or holds something else.
    """
    value = load_json(path, distinct=distinct)
    if not isinstance(value, dict):
        raise broken(path.name, f"a JSON {type(value).__name__}", "an object")
    return value


def write_config(path: Path, value: Any) -> None:
    """Write a JSON file of a checkpoint: as transformers writes its own, letters as they are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a kill or a power cut leaves the old file or the new one, whole."""
    write_whole(path, strict_json.dumps(value, indent=2) + "\n")
