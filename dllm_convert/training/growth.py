"""Blocks that grow over the first steps of a training, and what a time limit does to such steps.

LLaDA2 (arXiv 2512.15745) warms an autoregressive model up by blocks of 1, 4, 32 and 64 tokens and
more before it trains at the size that it keeps; NBDiff (arXiv 2512.06776) has them grow from 1. A
block of one token with the token shift is the base's own task, so the first stage is where the
base already is.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise


@dataclass(frozen=True)
class Timetable:
    """Which step of the plan a step stands for.

    A time limit may leave fewer steps than were planned. What fades or grows then takes the same
    share of those there are: it asks for a step of the plan, and need not know of the limit.

    Attributes:
        planned: Steps of the whole training; None if nobody said, and nothing is shortened.
        at: Steps after which it was found out how many there are.
        steps: All steps that there are; None for those that were planned.
    """

    planned: int | None = None
    at: int = 0
    steps: int | None = None

    def in_plan(self, step: int) -> Fraction:
        """Return where in the plan a step stands, steps that were taken before it being `step`."""
        if self.steps is None or self.planned is None or step < self.at:
            return Fraction(step)
        return Fraction(step * self.planned, self.steps)


def faded(steps: int, now: Fraction) -> float:
    """Return what is left, from 1 down to 0, of what fades over the first steps of a plan."""
    return max(float(1 - now / steps), 0.0) if steps else 0.0


@dataclass(frozen=True)
class BlockGrowth:
    """Which block size a training has at which step.

    Attributes:
        sizes: Tokens per block of each stage; afterwards blocks have the size of the objective.
        steps: Steps of all stages together, which are as long as each other.
    """

    sizes: tuple[int, ...]
    steps: int

    def size_at(self, now: Fraction) -> int | None:
        """Return tokens per block at a step of the plan, None once the stages are over."""
        stage = int(now * len(self.sizes) / self.steps)
        return self.sizes[stage] if stage < len(self.sizes) else None

    def stages(self) -> tuple[tuple[int, int], ...]:
        """Return the size and the number of steps of each stage, as planned."""
        count = len(self.sizes)
        ends = [-(-stage * self.steps // count) for stage in range(count + 1)]
        lengths = [end - start for start, end in pairwise(ends)]
        return tuple(zip(self.sizes, lengths, strict=True))
