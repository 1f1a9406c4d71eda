"""Say clearly that a disk is full, before or while writing."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dllm_convert.errors import DataError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says when there is no room left, or no quota."""


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
