"""metrics.jsonl: one JSON object per logged step, over all sessions of a run."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dllm_convert.common import strict_json
from dllm_convert.common.disk import sync, write_whole

GIB = 1 << 30


class Metrics:
    """The log of a run, cut back to the step it goes on from.

    Lines after that step are dropped: they are repeated. A line a kill left unfinished is dropped
    with them.

    Args:
        path: Path of metrics.jsonl.
        step: Optimizer step the run goes on from, 0 for a fresh one.
        writes: Whether this process writes; the others read only.
    """

    def __init__(self, path: Path, step: int, *, writes: bool) -> None:
        self.path = path
        self._writes = writes
        kept = _lines_up_to(path, step)
        self.last: Mapping[str, Any] = kept[-1] if kept else {}
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(strict_json.dumps(line) + "\n" for line in kept))

    def append(self, line: Mapping[str, Any]) -> None:
        """Add the line of a step."""
        self.last = line
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(strict_json.dumps(line) + "\n")

    def sync(self) -> None:
        """Wait until all lines have reached the disk."""
        if self._writes and self.path.exists():
            sync(self.path)


def _lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            reached = int(record["step"])
        except (ValueError, KeyError, TypeError):
            break
        if reached > step:
            break
        kept.append(record)
    return kept


def peak_memory() -> int:
    """Return the most memory this process has used so far, in bytes: the GPU's, or resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
