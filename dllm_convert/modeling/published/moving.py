"""Numbers on their way between the host and a device, while both do something else."""

from __future__ import annotations

from typing import Any

import torch


def sent(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Return numbers as a tensor on a device, without waiting for it to arrive."""
    made = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    if device.type == "cuda" and made.device.type == "cpu":
        # Memory that can be swapped out is copied while the host waits.
        made = made.pin_memory()
    return made.to(device, non_blocking=True)


class Late:
    """A tensor that is on its way to the host while the device goes on working."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._here = tensor.to("cpu", non_blocking=True)
        cuda: Any = torch.cuda
        self._arrived = cuda.Event() if tensor.device.type == "cuda" else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Any:
        """Return its numbers: a wait only if the device has not come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.tolist()
