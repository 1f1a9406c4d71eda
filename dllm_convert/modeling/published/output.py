"""What `generate` returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils.generic import ModelOutput

from .options import Decoded


@dataclass
class DiffusionOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: Prompt and new tokens, shape (batch, prompt + max_new_tokens).
        forwards: Forward passes run.
        tokens_per_forward: New tokens divided by forwards and rows.
        order: Where it was asked for: the forward, counted from 1, in which each token of
            `sequences` was committed; 0 at tokens that were given and at padding.
        new_tokens: New tokens of each row, its end-of-text token included, padding not, shape
            (batch,).
        verifier_forwards: Of lossless decoding with two models: how many of the forwards were the
            verifier's; the others were the drafter's.
        close: Of lossless decoding: tokens that stood so near another one's logit that a forward of
            a single token may have rounded otherwise.
    """

    sequences: torch.Tensor | None = None
    forwards: int | None = None
    tokens_per_forward: float | None = None
    order: torch.Tensor | None = None
    new_tokens: torch.Tensor | None = None
    close: int | None = None
    verifier_forwards: int | None = None


def put_together(
    prompts: torch.Tensor,
    mask: torch.Tensor,
    order: torch.Tensor,
    decoded: Decoded,
    *,
    with_order: bool,
) -> DiffusionOutput:
    """Put what was decoded behind, and into, the prompts (batch, length) as they were given.

    `mask` is 1 at their tokens; `order` is the column each of `decoded.prompts` came from.
    """
    given, places = mask.bool(), order[:, : decoded.prompts.shape[1]]
    filled = torch.where(given, prompts.scatter(1, places, decoded.prompts), prompts)
    earlier = torch.zeros_like(prompts).scatter(1, places, decoded.prompt_order) * given
    per_row = int(decoded.new.sum()) / max(len(prompts), 1)
    return DiffusionOutput(
        sequences=torch.cat([filled, decoded.rows], dim=1),
        forwards=decoded.forwards,
        tokens_per_forward=per_row / max(decoded.forwards, 1),
        order=torch.cat([earlier, decoded.order], dim=1) if with_order else None,
        new_tokens=decoded.new,
        close=decoded.close,
        verifier_forwards=decoded.verifier_forwards,
    )
