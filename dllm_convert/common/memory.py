"""Memory that this process may still take, or gives back, and bytes in words."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def _number(path: Path) -> int | None:
    """Return the number a file of the kernel holds, None for `max` and for no file."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _reclaimable(folder: Path) -> int:
    """Return the bytes of file cache that the kernel would give up first."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    facts = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(facts.get("inactive_file", facts.get("total_inactive_file", "0")))


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of the control groups this process is in, innermost first."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, kinds, name = [*line.split(":", 2), "", ""][:3]
        top = root if not kinds else root / "memory"
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = top / name.lstrip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
    # Inside a container the group's own folder is mounted here, whatever it is called outside.
    yield from (root, root / "memory")


def cgroup_available(root: Path = CGROUP, own: Path = OWN_CGROUP) -> int | None:
    """Return the bytes that control groups (version 2 or 1) leave this process, None if any."""
    rooms = []
    for folder in _groups(root, own):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                rooms.append(max(limit - used + _reclaimable(folder), 0))
    return min(rooms, default=None)


def available_bytes() -> int:
    """Return the bytes of memory this process may still take."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = cgroup_available()
    return free if limit is None else min(free, limit)


def free_memory() -> None:
    """Give back what a model and its training held, before the next is loaded.

    The Trainer, its optimizer and callbacks hold each other: weights, gradients and moments stay
    until the collector happens to run, and what it frees stays with torch's allocator.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_words(count: int) -> str:
    """Return a number of bytes with a unit, such as `2.5 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
