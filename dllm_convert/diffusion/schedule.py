"""Noise schedules: the share of tokens still clean at time t, and the bound's weight.

Continuous-time masked diffusion as in MDLM (arXiv 2406.07524) and MD4 (arXiv 2406.04329), and in
discrete time as in D3PM (arXiv 2107.03006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dllm_convert.modeling.published.noising import Noising


@dataclass(frozen=True)
class Schedule:
    """alpha(t), falling from 1 at t=0 to 0 at t=1.

    Attributes:
        name: `linear` (1-t), `cosine` (1-cos(pi/2 (1-t)), MD4) or `polynomial` (1-t^power, MD4).
        power: Exponent of the polynomial.
        min_time: Times are drawn from (min_time, max_time].
        max_time: See `min_time`.
        discrete_steps: T, times are 1/T, 2/T, ..., 1; None for continuous time.
    """

    name: str = "linear"
    power: float = 2.0
    min_time: float = 0.0
    max_time: float = 1.0
    discrete_steps: int | None = None

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha(t), the probability that a token is masked; same shape as `t`, in [0, 1]."""
        return Noising(self.name, self.power).share(t)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """What a masked token weighs in the bound when t is uniform; same shape as `t`.

        Continuous time: -alpha'(t) / (1 - alpha(t)). T discrete times: a token masked at t becomes
        visible at t - 1/T with probability (alpha(t - 1/T) - alpha(t)) / (1 - alpha(t)), times T
        (D3PM, appendix A.3).
        """
        if self.discrete_steps is not None:
            now = self.mask_probability(t)
            before = self.mask_probability(t - 1 / self.discrete_steps)
            return self.discrete_steps * (now - before) / now
        if self.name == "linear":
            return 1 / t
        if self.name == "cosine":
            return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))
        return self.power / t

    def times(self, level: torch.Tensor) -> torch.Tensor:
        """Place levels in (0, 1], float64, in the interval of times; on the grid if discrete."""
        t = self.min_time + (self.max_time - self.min_time) * level
        if self.discrete_steps is None:
            return t
        # A level on the grid stays there: 0.3 * 10 is 3.0000000000000004.
        return (t * self.discrete_steps - 1e-9).ceil().clamp(min=1) / self.discrete_steps
