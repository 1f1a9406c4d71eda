"""What a training counts between two lines of its log."""

from __future__ import annotations

from collections.abc import Callable

import torch

_MEANS = {
    "nelbo": ("nats", "scored"),
    "divergence": ("divergence", "taught"),
    "own_divergence": ("own_divergence", "own_taught"),
    "cosine": ("cosine", "aligned"),
    "entropy": ("entropy", "right"),
}
"""What is logged, and the two sums that it is the ratio of."""
_NAMES = tuple(name for pair in _MEANS.values() for name in pair)


class Counts:
    """Sums over the tokens of some steps, of this process.

    `nats` of the bound over `scored` tokens; `divergence` from a teacher over those it `taught`, of
    text that the model wrote itself `own_divergence` over `own_taught`; `cosine` with a teacher's
    hidden states over those that are `aligned`; `entropy` over what was predicted `right` already.

    They stay on the device until they are asked for: asking for a number there and then has every
    forward wait for the one before it.

    Args:
        device: Where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(_NAMES), dtype=kind, device=device)

    def add(self, **sums: torch.Tensor | float) -> None:
        """Add to some of the sums, by name."""
        for name, value in sums.items():
            self._sums[_NAMES.index(name)] += value

    def to(self, device: torch.device) -> None:
        """Count on another device."""
        self._sums = self._sums.to(device)

    def take(self, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the means of what was counted, over all processes, and begin anew.

        Args:
            total: Sums over processes; returned on the CPU.

        Returns:
            Those of `_MEANS` that have tokens.
        """
        found = dict(zip(_NAMES, total(self._sums).tolist(), strict=True))
        self._sums.zero_()
        return {
            name: found[value] / found[over]
            for name, (value, over) in _MEANS.items()
            if found[over]
        }
