"""Say clearly that a disk is full, before or while writing."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dllm_convert.errors import DataError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says when there is no room left, or no quota."""


CHUNK_BYTES = 4 << 20


def read_chunks(handle: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    """Read a part of a file in pieces of at most 4 MiB.

    Raises:
        DataError: The file ends early.
    """
    handle.seek(start)
    while length > 0:
        chunk = handle.read(min(CHUNK_BYTES, length))
        if not chunk:
            raise DataError(
                f"{handle.name}: ended {length} bytes early, it changed while being read"
            )
        length -= len(chunk)
        yield chunk


def link(source: Path | str, target: Path | str) -> None:
    """Hard-link where the file system can, to save a second copy of weights; else copy."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _full(folder: Path, needed: int) -> DataError:
    free = shutil.disk_usage(_existing(folder)).free
    return DataError(
        f"disk full: {folder} needs {needed:,} bytes, {free:,} are free",
        hint="Free some space, or write elsewhere with --out",
    )


@contextmanager
def writing(folder: Path, needed: int) -> Iterator[None]:
    """Check for space first, and report a write that fails as a known error.

    Args:
        folder: Where files are about to be written; need not exist yet.
        needed: Bytes that will be written.

    Raises:
        DataError: The disk is or becomes full, or the folder cannot be written.
    """
    if shutil.disk_usage(_existing(folder)).free < needed:
        raise _full(folder, needed)
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror})") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise _full(folder, needed) from error
        raise
