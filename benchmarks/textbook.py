"""The step that research scripts run, written from the papers: what ours is measured against.

One `[x_t ; x_0]` forward (BD3LM, arXiv 2503.09573) or one of x_t (MDLM, arXiv 2406.07524) with
logits at every position, the dense mask built anew in each step, cross-entropy over every position
and one noise level per sequence. Nothing here is used by the package.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def dense_mask(length: int, block: int | None, device: torch.device) -> torch.Tensor:
    """Boolean mask (1, 1, n, n): everything, or BD3LM's over both streams."""
    if block is None:
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    index = torch.arange(2 * length, device=device)
    clean = index >= length
    number = (index % length) // block
    query, key = number[:, None], number[None, :]
    own = (query == key) & (clean[:, None] == clean[None, :])
    before = (query > key) & clean[None, :]
    return (own | before)[None, None]


def loss(
    model: Any,
    tokens: torch.Tensor,
    mask_token_id: int,
    block: int | None,
    generator: torch.Generator,
    *,
    shift: bool = False,
) -> torch.Tensor:
    """The NELBO of tokens (batch, length), in nats per token.

    Args:
        model: A model that takes a 4-D mask.
        tokens: Clean text without padding.
        mask_token_id: The mask.
        block: Tokens per block, None for MDLM.
        generator: Source of noise, on the device of the tokens.
        shift: Read position i from the hidden state of i-1; a block's first from the clean stream.
    """
    (batch, length), device = tokens.shape, tokens.device
    t = torch.rand(batch, 1, generator=generator, device=device) * 0.999 + 1e-3
    masked = torch.rand(batch, length, generator=generator, device=device) < t
    noisy = torch.where(masked, mask_token_id, tokens)
    places = torch.arange(length, device=device).expand(batch, -1)
    if block is not None:
        noisy, places = torch.cat([noisy, tokens], 1), places.repeat(1, 2)
    mask = dense_mask(length, block, device).expand(batch, -1, -1, -1)
    logits = model(
        input_ids=noisy, attention_mask=mask, position_ids=places, use_cache=False
    ).logits
    if shift:
        logits = _shifted(logits, length, block)
    nats = F.cross_entropy(
        logits[:, :length].float().flatten(0, 1), tokens.flatten(), reduction="none"
    ).view(batch, length)
    return (nats * masked / t).sum() / (batch * length)


def _shifted(logits: torch.Tensor, length: int, block: int | None) -> torch.Tensor:
    before = logits[:, :length].roll(1, dims=1)
    if block is None:
        return before
    first = torch.arange(length, device=logits.device) % block == 0
    return torch.where(first[:, None], logits[:, length:].roll(1, dims=1), before)
