"""States that a decoding passed through, as draws of noise over what it wrote.

What a model sees while it writes is not what a forward process draws: the tokens that stand there
first are its own, and those that it was surest of. On-policy distillation (OPDLM, arXiv 2606.06712)
therefore learns at states of the model's own trajectories. Where nothing that is written is taken
back, a trajectory is told by its end and by the forward in which each token was committed: before
forward k all tokens were masked that were committed in k or later. Blocks (BD3LM, arXiv 2503.09573)
are written one after the other, each behind finished ones, so that each has a state of its own.
"""

from __future__ import annotations

import torch

from dllm_convert.diffusion.corruption import Corruption, NoiseKey, levels, number_groups
from dllm_convert.diffusion.objective import Objective, TextBatch


def visited_states(
    batch: TextBatch, order: torch.Tensor, objective: Objective, key: NoiseKey, views: int = 1
) -> tuple[Corruption, ...]:
    """Draw a state of every block, or text, that a decoding passed through.

    Each of the forwards that wrote a block (MDLM: a text) is equally likely. A token weighs what
    `noise.draw: count` has it weigh: of n tokens that were written, m of them masked, n / m. Where
    every forward writes one token, m is as that draw has it.

    Args:
        batch: What was written, on the CPU; `loss` are the new tokens.
        order: The forward in which each token was committed, counted from 1, shape (batch, length);
            what stands at other tokens does not matter.
        objective: mdlm or bd3lm, absorbing kernel.
        key: Which draw.
        views: Draws over the same trajectory.

    Returns:
        One draw per view.
    """
    written = batch.scorable
    # Blocks, or documents, numbered over a batch, (batch, length), and counted by row, (batch,).
    groups, counts = number_groups(batch.noise_groups(objective))
    # Each written token by its group and forward, (n,); of all different ones of these, sorted, the
    # first of a group is its first forward: a token's rank in its group tells how many came before.
    most = int(order.max()) + 1
    pairs, place = torch.unique(groups[written] * most + order[written], return_inverse=True)
    forwards = torch.bincount(
        pairs // most, minlength=int(counts.sum())
    )  # of each group, (groups,)
    before = forwards.cumsum(0) - forwards
    rank = torch.zeros_like(order)
    rank[written] = place - before[groups[written]]
    sizes = torch.bincount(groups[written], minlength=len(forwards))
    found = []
    for view in range(views):
        # A level in (0, 1] of each group names one of its forwards, counted from 0.
        chosen = (levels(key, counts, view, views) * forwards).ceil().long() - 1
        masked = written & (rank >= chosen[groups])
        left = torch.bincount(groups[masked], minlength=len(forwards)).clamp(min=1)
        weight = (sizes / left)[groups]
        found.append(Corruption(masked, torch.where(masked, weight, 0.0).float()))
    return tuple(found)
