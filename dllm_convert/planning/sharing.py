"""What processes that train together share, and what each of them holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sharing:
    """What one device holds of a training; alone it holds everything.

    Attributes:
        weights: Devices that share one copy of the weights.
        gradients: Devices that share one copy of the gradients.
        moments: Devices that share one copy of the optimizer's moments.
        gathered: What is put together for a computation and given back: `layers` after each, or
            all `weights`, kept from forward to backward; None where each device holds all anyway.
        buckets: Whether gradients are copied together before they are exchanged (DDP).
        zero: Whether it is DeepSpeed's ZeRO, which computes with weights and gradients in 16 bits
            beside a float32 copy of what is trained, shared as the moments are.
        offload: What lies in host memory instead: `weights`, `moments`.
    """

    weights: int = 1
    gradients: int = 1
    moments: int = 1
    gathered: Literal["layers", "weights"] | None = None
    buckets: bool = False
    zero: bool = False
    offload: tuple[str, ...] = ()

    @classmethod
    def all_by(cls, devices: int) -> Sharing:
        """Return what FSDP2 shares by so many devices."""
        return cls(devices, devices, devices, "layers") if devices > 1 else cls()
