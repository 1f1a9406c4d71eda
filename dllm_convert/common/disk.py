"""Say clearly that a disk is full, before or while writing."""

from __future__ import annotations

import errno
import os
import re
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


def sync_tree(folder: Path) -> None:
    """Wait until every file below a folder, and the names of the files, have reached the disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_file() or path.is_dir():
            sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk.

    File systems that cannot promise it for a folder refuse; there is nothing else to do then.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a kill or a power cut leaves the old one or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    # A link with this name would have its target emptied; a leftover of a kill is in the way.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


_WRITE_FAILED = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+"
    r"|No space left on device|Disk quota exceeded|File too large|os error (28|27|122)\b"
)


def no_room(error: BaseException) -> bool:
    """Whether a write failed for lack of room, whoever reports it.

    torch and safetensors write files themselves, and say what failed in words only.
    """
    if isinstance(error, OSError) and error.errno in {*DISK_FULL, errno.EFBIG}:
        return True
    if _WRITE_FAILED.search(str(error)):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and no_room(cause)


@contextmanager
def reporting_full_disk(folder: Path) -> Iterator[None]:
    """Report a write that failed for lack of room as a known error.

    Raises:
        DataError: A write below `folder` failed so.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not no_room(error):
            raise
        free = shutil.disk_usage(_existing(folder)).free
        raise DataError(
            f"disk full: a file could not be written below {folder}, {free:,} bytes are free",
            hint="Free some space; the same command goes on from here",
        ) from error


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
