"""Blocks that grow over the first steps of a training.

LLaDA2 (arXiv 2512.15745) warms an autoregressive model up by blocks of 1, 4, 32 and 64 tokens and
more before it trains at the size that it keeps; NBDiff (arXiv 2512.06776) has them grow from 1. A
block of one token with the token shift is the base's own task, so the first stage is where the
base already is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class BlockGrowth:
    """Which block size a training has at which step.

    Attributes:
        sizes: Tokens per block of each stage; afterwards blocks have the size of the objective.
        steps: Steps of all stages together, which are as long as each other.
        planned: Steps of the whole training.
    """

    sizes: tuple[int, ...]
    steps: int
    planned: int

    def size_at(self, step: int, pace: tuple[int, int] | None = None) -> int | None:
        """Return tokens per block of an optimizer step, None once the stages are over.

        Args:
            step: Steps that were taken before it.
            pace: Where a time limit left fewer steps than planned: after how many that was found
                out, and how many there are. From there on the stages take the same share of them.
        """
        at, total = (0, self.planned) if pace is None else pace
        # In whole numbers: step / (steps * total / planned) of all stages.
        scale = (total, self.planned) if step >= at else (1, 1)
        stage = step * len(self.sizes) * scale[1] // (self.steps * scale[0])
        return self.sizes[stage] if stage < len(self.sizes) else None

    def stages(self) -> tuple[tuple[int, int], ...]:
        """Return the size and the number of steps of each stage, as planned."""
        count = len(self.sizes)
        ends = [-(-stage * self.steps // count) for stage in range(count + 1)]
        lengths = [end - start for start, end in pairwise(ends)]
        return tuple(zip(self.sizes, lengths, strict=True))
