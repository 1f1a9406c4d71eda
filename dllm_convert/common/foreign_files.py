"""Files that somebody else wrote: ordinary ones, inside their folder, of a size their kind has.

What a folder holds need not be what its names say: a pipe waits for ever, a device never ends, a
sparse file of 100 GB takes no room until it is read, and a link called LICENSE may lead to a key.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from dllm_convert.errors import DataError

MIB = 1 << 20
MAX_TEXT_BYTES = 16 * MIB
"""Licences, notices, templates, recipes: the largest known have a few hundred kilobytes."""
MAX_VOCABULARY_BYTES = 128 * MIB
"""Four times the largest tokenizer.json known."""

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def check_file(path: Path, limit: int | None = None) -> int:
    """Check that a path is an ordinary file of at most `limit` bytes, before it is opened.

    Returns:
        Its size in bytes.

    Raises:
        DataError: It is something else, or larger.
        OSError: It is not there.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise DataError(f"{path} is {kind}, expected a file", hint="Put the file itself there")
    if limit is not None and found.st_size > limit:
        raise DataError(
            f"{path} has {found.st_size:,} bytes, expected at most {limit:,}",
            hint="Check where the file comes from: no file of its kind is that large",
        )
    return found.st_size


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a whole file.

    Raises:
        DataError: It is no ordinary file, larger than `limit`, or cannot be read.
    """
    try:
        size = check_file(path, limit)
        with path.open("rb") as file:
            # Asked for the limit, Python would make room for all of it.
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a whole UTF-8 text.

    Raises:
        DataError: As `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: cannot be read as UTF-8 text ({error})") from error


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Check that the files of a folder lie in it, whatever links there are.

    The cache of the Hub's client links each file of a snapshot to a blob beside the snapshots, and
    its older releases linked the files of a folder (`--local-dir`) there, too.

    Raises:
        DataError: A file is a link that leads out of the folder.
    """
    inside = folder.resolve()
    roots = [inside]
    if inside.parent.name == "snapshots":
        roots.append(inside.parents[1] / "blobs")
    for name in names:
        path = folder / name
        target = Path(os.path.realpath(path))
        if not (any(target.is_relative_to(root) for root in roots) or _is_blob(target)):
            raise DataError(
                f"{path} is a link that leads out of the folder, to {target}",
                hint="If that file belongs to the checkpoint, put the file itself there",
            )


def _is_blob(target: Path) -> bool:
    """Whether a path is content in a cache of the Hub's client: named by its hash alone."""
    store = target.parent.parent
    return (
        target.parent.name == "blobs"
        and store.name.startswith("models--")
        and (store / "snapshots").is_dir()
        and _HASH.fullmatch(target.name) is not None
    )
