"""Hidden states that stay where a base has them.

REPR-ALIGN (arXiv 2605.06885) draws the hidden states of a diffusion model, after every layer,
towards those of the frozen autoregressive model at the same position, by their cosine:

    loss + weight * mean over layers of (1 - cos(h_S, h_T))

What is to be learnt then is another order of writing and not another language; it reports up to
four times fewer steps where there is little data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def states_at(states: Sequence[torch.Tensor], places: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what stands after every layer at some places.

    Args:
        states: After the embedding and after every layer, each (batch, length, width).
        places: Flat places in (batch * length), shape (n,).

    Returns:
        Of every layer, not of the embedding, (n, width).
    """
    return tuple(state.flatten(0, 1)[places] for state in states[1:])


def misalignment(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one minus the cosine at each place, the mean over layers; shape (n,), float32.

    Args:
        student: Hidden states of each layer, (n, width).
        teacher: Those of the base, (n, width).
    """
    apart = [
        1 - torch.cosine_similarity(own.float(), given.float(), dim=-1)
        for own, given in zip(student, teacher, strict=True)
    ]
    return torch.stack(apart).mean(0)
