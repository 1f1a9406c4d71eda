"""The folder in which an output is made: one run at a time, and nothing outside it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dllm_convert.errors import DataError

WORK = ".work"


LOCK = "lock"


def work_folder(out: Path) -> Path:
    """Return the work folder of `out`, made if there is none.

    Raises:
        DataError: It is a link, or something below it is: writing would land elsewhere.
    """
    work = out / WORK
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise DataError(
            f"{work} is {'a link' if work.is_symlink() else 'a file'}, expected a folder of ours",
            hint=f"Remove {work}, or give another --out",
        )
    work.mkdir(parents=True, exist_ok=True)
    entries = (Path(parent, n) for parent, *names in os.walk(work) for n in (*names[0], *names[1]))
    inside = work.resolve()
    links = (path for path in entries if path.is_symlink())
    link = next((path for path in links if not path.resolve().is_relative_to(inside)), None)
    if link is not None:
        raise DataError(
            f"{link} is a link that leads out of the folder: writing would land elsewhere",
            hint=f"Remove {link}, or give another --out",
        )
    return work


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder; its work folder is made if there is none.

    Raises:
        DataError: If another process holds it, or the lock is a link.
    """
    path = work_folder(out) / LOCK
    try:
        # Neither followed nor emptied: it may be anything that somebody put there.
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened ({error.strerror})", hint=f"Remove {path}"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another run is writing to {out}", hint="Wait for it, or give another --out"
            ) from error
        yield
    finally:
        os.close(handle)
