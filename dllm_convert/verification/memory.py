"""Whether a checkpoint fits memory, decided from headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_convert.behaviour.influence import TOKENS_AT_ONCE
from dllm_convert.errors import DataError
from dllm_convert.source.safetensors_header import Header

if TYPE_CHECKING:
    from dllm_convert.verification.subject import Subject

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
WITHOUT_MODEL = frozenset({"files", "tokens", "quality"})
"""Groups of probes that read headers, or one tensor at a time."""
_ONE_MODEL = frozenset({"attention", "gradient", "training"})
"""Groups that hold one model; the others hold a second beside it, or the first in float64."""
_FLOAT32 = 4
_LOGIT_TENSORS = 3
"""Tensors of the size of the logits that a probe holds at once: text, changed text, difference."""


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


def in_words(count: int) -> str:
    """Return a number of bytes with a unit, such as `2.5 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _too_large(what: str, needed: int) -> str | None:
    free = available_bytes()
    if needed <= free:
        return None
    return f"{what} needs {in_words(needed)} of memory, {in_words(free)} are free"


def group_refusal(subject: Subject, group: str) -> str | None:
    """Return why a group of probes cannot run in this memory, None if it can.

    The model is loaded in float32; one that an earlier group loaded is counted as free of charge.
    """
    if group in WITHOUT_MODEL:
        return None
    try:
        headers = subject.headers
    except DataError:
        return None  # the probe `weights` says what is wrong with them
    rows = (subject.shapes.get(subject.adapter.embedding) or (0,))[0]
    copies = (1 if group in _ONE_MODEL else 2) - ("model" in vars(subject))
    return model_refusal(headers, copies=copies, rows=rows)


def model_refusal(headers: Mapping[str, Header], *, copies: int, rows: int = 0) -> str | None:
    """Return why a model cannot be held in float32, None if it can.

    Args:
        headers: Headers of its weights.
        copies: How many times it is held at once.
        rows: Tokens of the vocabulary, for the logits.
    """
    shapes = (entry.shape for header in headers.values() for entry in header.entries.values())
    weights = copies * sum(map(prod, shapes)) * _FLOAT32
    return _too_large(
        "the model in float32", weights + _LOGIT_TENSORS * TOKENS_AT_ONCE * rows * _FLOAT32
    )


def tensor_refusal(headers: Mapping[str, Header]) -> str | None:
    """Return why the tensors cannot be read one at a time, None if they can."""
    sizes = {
        name: entry.end - entry.start
        for header in headers.values()
        for name, entry in header.entries.items()
    }
    name = max(sizes, key=sizes.__getitem__, default=None)
    return None if name is None else _too_large(f"tensor {name} alone", sizes[name])
