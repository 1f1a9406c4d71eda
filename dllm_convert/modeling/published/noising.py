"""The noise that a model was trained with: how much of a text it has reached at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Noising:
    """1 - alpha(t), rising from 0 at t = 0 to 1 at t = 1.

    Attributes:
        schedule: `linear` (t), `cosine` (cos(pi/2 (1 - t)), MD4, arXiv 2406.04329) or `polynomial`
            (t^power, MD4).
        power: Exponent of the polynomial.
        steps: T of a bound in discrete time (D3PM, arXiv 2107.03006); None: continuous time.
        exponents: Where the schedule was learnt: w of each class of words, t^w (MD4, section 6).
        classes: Ids of the words of all classes but the last, which has the others.
    """

    schedule: str = "linear"
    power: float = 2.0
    steps: int | None = None
    exponents: tuple[float, ...] = ()
    classes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Noising:
        """Read it from the `diffusion` section of a config."""
        return cls(
            section.get("noise_schedule", cls.schedule),
            section.get("noise_power", cls.power),
            section.get("discrete_steps"),
            tuple(section.get("noise_exponents", ())),
            tuple(map(tuple, section.get("noise_classes", ()))),
        )

    def share(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that noise has reached a token at times `t`, of their shape, in [0, 1]."""
        if self.schedule == "linear":
            return t.clamp(0, 1)
        if self.schedule == "cosine":
            return torch.cos(math.pi / 2 * (1 - t)).clamp(0, 1)
        return t.clamp(0, 1) ** self.power

    def grid(self, steps: int) -> torch.Tensor:
        """Those at times 0, 1/T, ..., 1, shape (steps + 1,), float64; its ends are 0 and 1."""
        shares = self.share(torch.arange(steps + 1, dtype=torch.float64) / steps)
        shares[0], shares[-1] = 0, 1
        return shares


def class_of_word(members: Sequence[Sequence[int]], words: int) -> torch.Tensor:
    """Return the number of each word's class, shape (words,): the last one has all others.

    Args:
        members: Ids of the words of all classes but the last.
        words: How many words there are.
    """
    numbers = torch.full((words,), len(members))
    for number, known in enumerate(members):
        numbers[list(known)] = number
    return numbers
