"""CUDA graphs on a CPU: what is recorded reads and writes the same memory in every replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_convert.modeling.published import graphs

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")


class Recording(TorchDispatchMode):
    """Operations, as they run while it is entered; `replay` runs them again where they ran.

    CUDA records without running anything. Here they are run, so the first replay is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.has_run = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ASKS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Write every result where it was written before."""
        if self.has_run:
            self.has_run = False
            return
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self) -> int:
        """Whatever it is that CUDA graphs share."""
        return 0


def recorded(work: Callable[[], None], pool: Any) -> Recording:
    """Stand in for `graphs.recorded`."""
    with Recording() as recording:
        work()
    return recording


def record_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps recorded that are queued on a CPU."""
    monkeypatch.setattr(graphs, "can_record", lambda device: True)
    monkeypatch.setattr(graphs, "recorded", recorded)
