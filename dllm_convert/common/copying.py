"""Bring bytes from file to file, hashed on the way: shared blocks, a hard link, or one pass.

Holes stay holes: they are neither read nor written, only hashed as the zeros they stand for.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dllm_convert.errors import DataError

if TYPE_CHECKING:
    from hashlib import _Hash

Way = Literal["shared", "linked", "copied", "rewritten"]
"""How a file came about: blocks shared with the source (reflink), hard link, copy, new bytes."""

PIECE = 1 << 18
"""Bytes that are in flight at once: few enough to stay in a core's cache between their uses."""

_WRITE = 1 << 16
"""Bytes of a single write: so much memory the system then looks for in one go. With 256 KiB a copy
took twice the system time (ext4, Linux 6.18), with 32 KiB 1.7 times."""

_ZEROS = bytes(PIECE)
_FICLONE = 0x40049409  # linux/fs.h
_NOT_HERE = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ENOSYS}
)
"""What the system answers where files cannot share blocks, or not these two."""

Advance = Callable[[int], None]


def _nothing(_: int) -> None:
    pass


class TwinHash:
    """SHA-256 of what is read and of what is written; what both share is hashed once.

    Two checkpoints that differ in one row begin alike, and hashing is what takes longest.
    """

    def __init__(self) -> None:
        self._read = hashlib.sha256()
        self._written: _Hash | None = None

    def _split(self) -> _Hash:
        if self._written is None:
            self._written = self._read.copy()
        return self._written

    def both(self, data: bytes | memoryview) -> None:
        """Count bytes that are copied."""
        self._read.update(data)
        if self._written is not None:
            self._written.update(data)

    def read(self, data: bytes | memoryview) -> None:
        """Count bytes of the source that are not copied."""
        self._split()
        self._read.update(data)

    def written(self, data: bytes | memoryview) -> None:
        """Count bytes of the copy that the source does not have."""
        self._split().update(data)

    @property
    def digests(self) -> tuple[str, str]:
        """Hexadecimal digests of the source and of the copy, of what was counted so far."""
        read = self._read.hexdigest()
        return read, read if self._written is None else self._written.hexdigest()


def spans(handle: int, start: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, length, whether there are data) of a part of a file, in order."""
    position, end = start, start + length
    while position < end:
        try:
            data = os.lseek(handle, position, os.SEEK_DATA)
            hole = os.lseek(handle, data, os.SEEK_HOLE) if data < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole to the end of the file
                data, hole = min(end, max(position, os.fstat(handle).st_size)), end
            elif error.errno == errno.EINVAL:  # a file system that does not tell
                data, hole = position, end
            else:
                raise
        data, hole = min(data, end), min(hole, end)
        if data > position:
            yield position, data - position, False
        if hole > data:
            yield data, hole - data, True
        position = hole


def pieces(handle: int, start: int, length: int) -> Iterator[tuple[memoryview, bool]]:
    """Yield a part of a file in pieces of at most 256 KiB, each with whether it is data.

    Pieces of a hole are zeros that were not read. A piece is valid until the next one.

    Raises:
        DataError: The file ends early.
    """
    buffer, zeros = memoryview(bytearray(min(PIECE, length))), memoryview(_ZEROS)
    for first, size, is_data in spans(handle, start, length):
        position, end = first, first + size
        while position < end:
            want = min(PIECE, end - position)
            if not is_data:
                yield zeros[:want], False
                position += want
                continue
            got = os.preadv(handle, [buffer[:want]], position)
            if not got:
                raise DataError(f"a file ended {end - position} bytes early: it changed meanwhile")
            yield buffer[:got], True
            position += got


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write all bytes at the handle's position."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest[:_WRITE]) :]


def copy_part(
    source: int, out: int, start: int, length: int, hashes: TwinHash, advance: Advance = _nothing
) -> None:
    """Copy a part of `source` to the position of `out`, which ends up behind it.

    A hole at the end needs an `os.ftruncate` later.
    """
    for piece, is_data in pieces(source, start, length):
        hashes.both(piece)
        if is_data:
            write_all(out, piece)
        else:
            os.lseek(out, len(piece), os.SEEK_CUR)
        advance(len(piece))


def sha256_file(path: Path, advance: Advance = _nothing) -> str:
    """Return the SHA-256 of a file in hexadecimal; holes are not read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for piece, _ in pieces(file.fileno(), 0, size):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def workers() -> int:
    """How many files are worked on at once: hashing fills a core, more readers fill no disk."""
    return min(8, len(os.sched_getaffinity(0)))


def sha256_files(paths: dict[str, Path], advance: Advance = _nothing) -> dict[str, str]:
    """Return the SHA-256 of files, several at once: name to hexadecimal digest."""
    with ThreadPoolExecutor(workers()) as pool:
        digests = pool.map(lambda path: sha256_file(path, advance), paths.values())
        return dict(zip(paths, digests, strict=True))


@contextmanager
def switching_often() -> Iterator[None]:
    """Let threads that copy and hash go on promptly beside one that computes in Python.

    Each piece asks for the interpreter three times, and whoever computes keeps it for 5 ms unless
    told otherwise: longer than a piece takes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _share_blocks(source: Path, target: Path) -> bool:
    """Make `target` a copy-on-write copy, where the file system can (Btrfs, XFS, bcachefs)."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            return False
    return True


def _hard_link(source: Path, target: Path) -> bool:
    target.unlink(missing_ok=True)
    try:
        # The Hub's cache holds links: a hard link to one of those would point nowhere.
        target.hardlink_to(source.resolve())
    except OSError as error:
        if error.errno not in {*_NOT_HERE, errno.EMLINK, errno.EACCES}:
            raise
        return False
    return True


def place(
    source: Path, target: Path, *, link: bool, advance: Advance = _nothing
) -> tuple[Way, str]:
    """Make `target` hold what `source` holds, and return how, and the SHA-256.

    Blocks are shared wherever that is possible: a later write to either leaves the other alone. A
    hard link is the same file under two names, so it is made only where `link` asks for it.
    """
    if _share_blocks(source, target):
        return "shared", sha256_file(source, advance)
    if link and _hard_link(source, target):
        return "linked", sha256_file(source, advance)
    hashes = TwinHash()
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        copy_part(old.fileno(), new.fileno(), 0, size, hashes, advance)
        os.ftruncate(new.fileno(), size)
    return "copied", hashes.digests[0]
