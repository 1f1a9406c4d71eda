"""Work that a device does again and again: recorded once, and replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

_WARM = 2
"""Times that a piece of work is run before it is recorded: what it needs is then made."""


def can_record(device: torch.device) -> bool:
    """Whether work on a device can be recorded."""
    return device.type == "cuda" and torch.cuda.is_available()


def recorded(work: Callable[[], None], pool: Any) -> Any:
    """Record a piece of work, without doing it, as something that is replayed.

    Raises a RuntimeError if the work asks the device for numbers on its way.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph


class Graphs:
    """Runs pieces of work again and again; on a CUDA device as a recorded graph.

    A forward of one block launches hundreds of kernels that take less time than their launches. A
    graph launches them at once. It reads and writes the same memory in every replay, so what is run
    works on buffers that stay, and draws nothing.

    Args:
        wanted: Whether to record; only a CUDA device can.

    Attributes:
        replays: How often a graph was replayed.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self.wanted = wanted and can_record(device)
        self.replays = 0
        self._made: dict[Hashable, Any] = {}
        self._seen: Counter[Hashable] = Counter()
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do a piece of work; what has the same key does the same, on the same buffers."""
        self._seen[key] += 1
        if self.wanted and key not in self._made and self._seen[key] > _WARM:
            self._record(key, work)
        if key in self._made:
            self._made[key].replay()
            self.replays += 1
        else:
            work()

    def forget(self) -> None:
        """Drop all recordings: the buffers are others."""
        self._made.clear()
        self._seen.clear()
        self._pool = None

    def _record(self, key: Hashable, work: Callable[[], None]) -> None:
        try:
            graph = recorded(work, self._pool)
        except RuntimeError:
            # Recording ran nothing: the work is done as before.
            self.wanted = False
            return
        self._made[key], self._pool = graph, graph.pool()
