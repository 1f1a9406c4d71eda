"""Random numbers of a decoding that does not know which rows are still written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .options import DecodingOptions

_MANY = (1 << 64) - 1
KINDS = ("token", "order", "remask", "noise")

Draw = Callable[[torch.Tensor, torch.Generator | None], object]
"""Fills a tensor in place with numbers of a generator, or of torch's global one."""


def mixed(*numbers: int) -> int:
    """Return a seed out of several numbers (SplitMix64: each bit changes half of the others)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MANY
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MANY
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MANY
        state ^= state >> 31
    return state >> 1


class Draws:
    """A generator per row, sown anew for every draw.

    What a row gets depends on its seed, the region and the step alone: not on its neighbours, nor
    on how many forwards were run for them while it had nothing to write.
    """

    def __init__(self, options: DecodingOptions, device: torch.device) -> None:
        self._seeds = options.seeds
        self._generators = [torch.Generator(device) for _ in options.seeds]

    def fill(
        self,
        buffer: torch.Tensor,
        draw: Draw,
        kind: str,
        place: tuple[int, int],
        rows: Sequence[int],
        parts: Sequence[slice],
    ) -> None:
        """Fill a buffer (rows, n, ...), with seeds only the part of each row that is its own.

        Args:
            buffer: What is filled, in place.
            draw: Fills a tensor.
            kind: What the numbers decide, one of `KINDS`.
            place: Number of the region, and of the step in it.
            rows: Number of each row in the batch.
            parts: Which part of the buffer belongs to each.
        """
        if not self._seeds:
            draw(buffer, None)
            return
        for line, row, part in zip(buffer, rows, parts, strict=True):
            generator = self._generators[row]
            generator.manual_seed(mixed(self._seeds[row], KINDS.index(kind), *place))
            draw(line[part], generator)
