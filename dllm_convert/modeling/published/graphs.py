"""Work for a device: sent to it without waiting, recorded once and replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

_WARM = 2
"""Times that a piece of work is run before it is recorded: what it needs is then made."""


def sent(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Return numbers as a tensor on a device, without waiting for it to arrive."""
    made = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        # Memory that can be swapped out is copied while the host waits.
        made = made.pin_memory()
    return made.to(device, non_blocking=True)


class Late:
    """A tensor that is on its way to the host while the device goes on working."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._here = tensor.to("cpu", non_blocking=True)
        self._arrived: Any = None
        if tensor.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Any:
        """Return its numbers: a wait only if the device has not come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.tolist()


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
        self.wanted = wanted and device.type == "cuda" and torch.cuda.is_available()
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

    def _record(self, key: Hashable, work: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError:
            # A model that asks the device for numbers on its way: recording runs nothing, so the
            # work is done as before.
            self.wanted = False
            return
        self._made[key], self._pool = graph, graph.pool()
