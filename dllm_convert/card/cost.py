"""What training cost, as far as a run records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What training cost.

    Attributes:
        seconds: Wall time of training, in seconds.
        tokens: Clean tokens seen, padding included.
        device: What computed, None if it was not recorded.
        devices: How many of them.
        flops: Floating-point operations, as the run estimated them (`costs.flops_per_token`); None
            if it did not.
    """

    seconds: float
    tokens: int
    device: str | None
    devices: int
    flops: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of wall time, None if no time was measured."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def cost_of(manifest: Mapping[str, Any]) -> Cost | None:
    """Read what training cost from the content of dllm_convert.json; None without a training."""
    train = (manifest.get("measurements") or {}).get("train")
    if not train:
        return None
    return Cost(
        float(train["seconds"]),
        int(train["tokens"]),
        train.get("device"),
        int(train.get("devices") or 1),
        train.get("flops"),
    )
