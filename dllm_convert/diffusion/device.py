"""Tensors go to a device while it computes something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

Value = TypeVar("Value", torch.Tensor, None)


def moved(value: Value, device: torch.device) -> Value:
    """Return a tensor on a device, without waiting for it; None stays None.

    Memory that can be swapped out is copied while the host waits, so what goes to a CUDA device is
    put in page-locked memory first.
    """
    if value is None or value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    # The other way the host has to wait: nothing says when the copy has arrived.
    return value.to(device, non_blocking=device.type != "cpu")


def device_of(model: Any) -> torch.device:
    """Return where a model computes: where its first weight is, the CPU if it has none."""
    weights = model.parameters() if hasattr(model, "parameters") else iter(())
    weight = next(weights, None)
    return torch.device("cpu") if weight is None else weight.device


def rows_at_once(logits: torch.Tensor, *, cpu: int = 1 << 20, other: int = 1 << 26) -> int:
    """Return how many rows of logits (n, vocab) one piece has, at least one.

    Args:
        logits: What is cut.
        cpu: Entries of a piece on a CPU: of its cache.
        other: The same on another device, where few kernels are wanted.
    """
    entries = cpu if logits.device.type == "cpu" else other
    return max(1, entries // max(1, logits.shape[-1]))


def row_pieces(logits: torch.Tensor, *, cpu: int, other: int) -> Iterator[slice]:
    """Yield the rows of logits (n, vocab), as many at a time as `rows_at_once` says."""
    size = rows_at_once(logits, cpu=cpu, other=other)
    for first in range(0, len(logits), size):
        yield slice(first, first + size)
