"""Trainer checkpoints that survive a kill or a power cut: marked when whole, checked when used.

A checkpoint counts from the moment its marker appears. The marker is written last, after every
other file has reached the disk, and lists their sizes; older checkpoints go after that, and not
before. Whatever has no marker, or does not match it, is no checkpoint.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.utils.data import Dataset
from transformers.trainer import TRAINER_STATE_NAME

from dllm_convert.common.disk import sync_tree
from dllm_convert.common.json_files import write_json
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.source.safetensors_header import read_header

COMPLETE_MARKER = "complete"
_ZIPPED = (".pt", ".pth", ".bin")
_STATES = ("optimizer.pt", "scheduler.pt")
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, IndexError),
    *(ValueError, TypeError, AttributeError),
)
"""What torch raises for a pickle whose bytes are not what was written."""


@dataclass(frozen=True)
class Resumption:
    """Where a training goes on.

    Attributes:
        folder: Checkpoint to load, None for a fresh start.
        step: Optimizer steps it holds.
        stopped: Why the training ended there; empty if it did not.
        rows: Sequences that a step of it took over all processes; 0 if that is not known.
    """

    folder: Path | None = None
    step: int = 0
    stopped: str = ""
    rows: int = 0


class UsedRows(Dataset[dict[str, Any]]):
    """As many rows as were trained on, to be skipped and never read.

    Args:
        total: Number of rows.
    """

    def __init__(self, total: int) -> None:
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Refuse: these rows are used up."""
        raise IndexError(number)


def checkpoint_step(folder: Path) -> int:
    """Return the optimizer step in the name of a checkpoint folder."""
    return int(folder.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, whole or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that were completely written, newest first."""
    return [path for path in _checkpoints(folder) if (path / COMPLETE_MARKER).is_file()]


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was completely written, if any."""
    return next(iter(whole_checkpoints(folder)), None)


def mark_whole(checkpoint: Path, *, stopped: str = "", rows: int = 0) -> None:
    """Make a checkpoint count, once all of it has reached the disk.

    Args:
        checkpoint: Folder in which everything is written.
        stopped: Why the training ends with it, empty if it goes on.
        rows: Sequences that a step takes over all processes.
    """
    sync_tree(checkpoint)
    sizes = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_json(checkpoint / COMPLETE_MARKER, {"stopped": stopped, "rows": rows, "files": sizes})


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and whatever is older and not whole."""
    for path in whole_checkpoints(folder)[keep:]:
        _remove(path)
    newest = last_whole_checkpoint(folder)
    for path in _checkpoints(folder):
        stale = newest is not None and checkpoint_step(path) < checkpoint_step(newest)
        if stale and not (path / COMPLETE_MARKER).is_file():
            _remove(path)


def make_room(folder: Path) -> None:
    """Where the disk has no room for another checkpoint, give up older ones, but never the last."""
    whole = whole_checkpoints(folder)
    if not whole:
        return
    needed = sum(path.stat().st_size for path in whole[0].rglob("*") if path.is_file())
    while len(whole) > 1 and shutil.disk_usage(folder).free < needed:
        _remove(whole.pop())


def remove_unfinished(folder: Path) -> None:
    """Remove what was begun and never finished: room that a full disk may need."""
    for path in _checkpoints(folder):
        if not (path / COMPLETE_MARKER).is_file():
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # Without its marker first: half a checkpoint must not look like one.
    (checkpoint / COMPLETE_MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def is_in_shards(checkpoint: Path) -> bool:
    """Whether several processes wrote a checkpoint together, each what it held (FSDP)."""
    return (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir()


def is_fsdp_file(checkpoint: Path) -> bool:
    """Whether FSDP gathered a checkpoint into one file."""
    return (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file()


def check_sharing(checkpoint: Path, *, fsdp: bool, zero: bool) -> None:
    """Check that a checkpoint can be read by processes that share as these do.

    Args:
        checkpoint: Its folder.
        fsdp: Whether FSDP is in force.
        zero: Whether DeepSpeed is.

    Raises:
        IncompatibleError: DeepSpeed alone reads what it wrote, and FSDP one file of its own.
    """
    by_zero, by_fsdp = any(checkpoint.glob("global_step*")), is_fsdp_file(checkpoint)
    if by_zero != zero or (by_fsdp and not fsdp):
        by = "DeepSpeed" if by_zero else "FSDP" if by_fsdp else "something other than DeepSpeed"
        raise IncompatibleError(
            f"{checkpoint.name} was written by {by}, and these processes share otherwise",
            hint="Go on with the --launch-config it was begun with",
        )


def check_rows(resumed: Resumption, rows: int) -> None:
    """Check that a training goes on with steps of as many sequences: its text is counted in them.

    Args:
        resumed: Where it goes on.
        rows: Sequences that a step takes now, over all processes.

    Raises:
        IncompatibleError: It took others before.
    """
    if resumed.rows and resumed.rows != rows:
        raise IncompatibleError(
            f"checkpoint-{resumed.step} was trained with {resumed.rows} sequences per step, and "
            f"these processes would take {rows}",
            hint=f"Go on with --global-batch {resumed.rows}",
        )


def find_resumption(folder: Path, warn: Callable[[str], None], *, clean: bool) -> Resumption:
    """Return the newest checkpoint that can be read.

    Args:
        folder: Folder of the checkpoints.
        warn: Told of those that cannot, which an earlier one stands in for.
        clean: Remove what training cannot go on from; one process of several does.
    """
    found = Resumption()
    for path in whole_checkpoints(folder):
        problem = damage(path)
        if problem is None:
            marker = _marker(path)
            rows = int(marker.get("rows", 0))
            found = Resumption(path, checkpoint_step(path), marker["stopped"], rows)
            break
        warn(f"{path.name} cannot be read ({problem}): going on from the one before")
    if clean:
        for path in _checkpoints(folder):
            if not (path / COMPLETE_MARKER).is_file() or checkpoint_step(path) > found.step:
                _remove(path)
    return found


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint that was whole once, None if nothing is.

    Sizes show what a power cut or a full disk took; heads and directories of files show a block
    that came back empty. Bytes inside a tensor are not read: the manifest of the finished
    checkpoint and its verification are for those.
    """
    try:
        sizes = _marker(checkpoint)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{COMPLETE_MARKER} is broken"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
        if not _has_structure(path):
            return f"{name} is broken"
    return None


def _has_structure(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return path.name != TRAINER_STATE_NAME or (
                isinstance(content, dict) and isinstance(content.get("global_step"), int)
            )
        elif path.suffix in _ZIPPED:
            return zipfile.is_zipfile(path) and (path.name not in _STATES or _unpickles(path))
    except (DataError, ValueError):
        return False
    return True


def _unpickles(path: Path) -> bool:
    """Whether torch can read a state: its structure, not the numbers, which stay on the disk."""
    try:
        torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except _UNREADABLE:
        return False
    return True


def _marker(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / COMPLETE_MARKER).read_text(encoding="utf-8"))
    return content
