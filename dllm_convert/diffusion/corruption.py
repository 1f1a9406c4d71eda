"""The forward process: which tokens are masked, and what each masked token weighs in the bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_convert.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Corruption:
    """One draw of noise.

    Attributes:
        masked: Where a token is replaced by the mask, shape (batch, length), bool.
        weight: Weight of each masked token's cross-entropy in the NELBO, shape (batch, length),
            float32; 0 where nothing is masked.
    """

    masked: torch.Tensor
    weight: torch.Tensor


def number_groups(groups: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Number the groups of a batch consecutively.

    Args:
        groups: Group of each token, numbered within its row, shape (batch, length), int.

    Returns:
        The same with numbers that are unique in the batch, and how many there are.
    """
    rows = torch.arange(groups.shape[0], device=groups.device)[:, None]
    keys = rows * (int(groups.max()) + 2) + groups
    unique, inverse = torch.unique(keys, return_inverse=True)
    return inverse, len(unique)


def corrupt_by_time(
    groups: torch.Tensor,
    scorable: torch.Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Corruption:
    """Draw one time per group and mask each token independently with 1 - alpha(t).

    Args:
        groups: Which tokens share a noise level (a block in BD3LM, a text in MDLM), shape
            (batch, length), numbered within each row.
        scorable: Tokens that may be masked, shape (batch, length), bool.
        schedule: Noise schedule; its `weight` makes the sum an unbiased NELBO when unclipped.
        generator: Source of randomness, on the CPU.

    Returns:
        The corruption.
    """
    numbers, count = number_groups(groups)
    times = schedule.draw(count, generator).to(groups.device)
    t = times[numbers]
    uniform = torch.rand(groups.shape, generator=generator, dtype=torch.float64).to(groups.device)
    masked = scorable & (uniform < schedule.mask_probability(t))
    return Corruption(masked, torch.where(masked, schedule.weight(t), 0.0).float())


def corrupt_by_count(
    groups: torch.Tensor, scorable: torch.Tensor, generator: torch.Generator | None = None
) -> Corruption:
    """Draw how many of each group's n tokens are masked, uniformly from 1..n, then which.

    Integrating the continuous-time bound over t leaves, for every schedule, the sum over m of the
    expected cross-entropy at m masked tokens divided by m: the likelihood estimator of LLaDA (arXiv
    2502.09992, equation 6), with weight n/m. The same bound as `corrupt_by_time`, without its noise
    in the number of masked tokens and without weights near t = 0. The counts are stratified.

    Args:
        groups: As in `corrupt_by_time`.
        scorable: As in `corrupt_by_time`.
        generator: Source of randomness, on the CPU.

    Returns:
        The corruption.
    """
    numbers, count = number_groups(groups)
    flat = numbers.flatten()
    sizes = torch.zeros(count, dtype=torch.float64, device=groups.device)
    sizes.index_add_(0, flat, scorable.flatten().double())
    level = Schedule().draw(count, generator).to(groups.device)
    chosen = (level * sizes).ceil().clamp(min=1)
    uniform = torch.rand(groups.shape, generator=generator, dtype=torch.float64).to(groups.device)
    priority = torch.where(scorable, uniform, 2.0).flatten()
    order = (flat.double() * 4 + priority).argsort()
    starts = torch.bincount(flat, minlength=count).cumsum(0) - torch.bincount(flat, minlength=count)
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
    masked = scorable & (rank.view_as(groups) < chosen[numbers])
    weight = (sizes / chosen)[numbers]
    return Corruption(masked, torch.where(masked, weight, 0.0).float())
