"""Noise schedules: the share of tokens still clean at time t, and the bound's weight.

Continuous-time masked diffusion as in MDLM (arXiv 2406.07524) and MD4 (arXiv 2406.04329).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dllm_convert.schema import Noise


@dataclass(frozen=True)
class Schedule:
    """alpha(t), falling from 1 at t=0 to 0 at t=1.

    Attributes:
        name: `linear` (1-t), `cosine` (1-cos(pi/2 (1-t)), MD4) or `polynomial` (1-t^power, MD4).
        power: Exponent of the polynomial.
        min_time: Times are drawn from [min_time, max_time]; 0 is excluded by drawing, not by value.
        max_time: See `min_time`.
    """

    name: str = "linear"
    power: float = 2.0
    min_time: float = 0.0
    max_time: float = 1.0

    @classmethod
    def from_recipe(cls, noise: Noise) -> Schedule:
        """Build the schedule a recipe asks for."""
        return cls(noise.schedule, noise.power, noise.min_time, noise.max_time)

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha(t), the probability that a token is masked; same shape as `t`, in [0, 1]."""
        if self.name == "linear":
            return t
        if self.name == "cosine":
            return torch.cos(math.pi / 2 * (1 - t))
        return t**self.power

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """-alpha'(t) / (1 - alpha(t)), the bound's weight per masked token; same shape as `t`."""
        if self.name == "linear":
            return 1 / t
        if self.name == "cosine":
            return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))
        return self.power / t

    def draw(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw `count` times in (min_time, max_time], stratified: one uniform offset plus i/count.

        Shuffled, so that no group always gets the early times. Shape (count,), float64.
        """
        offset = 1 - torch.rand(1, generator=generator, dtype=torch.float64)
        even = (offset + torch.arange(count, dtype=torch.float64)) / count
        even = even[torch.randperm(count, generator=generator)]
        return self.min_time + (self.max_time - self.min_time) * even
