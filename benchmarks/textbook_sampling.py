"""Block diffusion decoding as public scripts do it: what ours is measured against.

Written from the paper (BD3LM, arXiv 2503.09573). Every block encodes the whole text before it anew,
every step copies the KV cache, and logits and probabilities are computed at every position of the
block. Nothing here is used by the package.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache


@torch.no_grad()
def decode(model: Any, prompt: torch.Tensor, new: int, steps: int) -> torch.Tensor:
    """Write `new` tokens behind a prompt.

    Args:
        model: A converted BD3LM.
        prompt: Shape (1, length).
        new: Tokens to write.
        steps: Forwards per block.

    Returns:
        New tokens, shape (new,).
    """
    size, mask = model.config.block_size, model.config.mask_token_id
    shift, length = model.config.diffusion["token_shift"], prompt.shape[1]
    device = prompt.device
    canvas = prompt
    for start in range(length // size * size, length + new, size):
        block = torch.full((1, size), mask, device=device)
        tail = canvas[:, start:]
        block[:, : tail.shape[1]] = tail
        cache, before = DynamicCache(), None
        if start:
            clean = canvas[:, :start]
            before = model(clean, past_key_values=cache, use_cache=True).logits[:, -1:]
        positions = torch.arange(start, start + size, device=device)[None]
        for left in range(steps, 0, -1):
            masked = block == mask
            if not masked.any():
                break
            logits = model(
                block,
                position_ids=positions,
                past_key_values=copy.deepcopy(cache),
                use_cache=True,
            ).logits
            if shift:
                first = torch.zeros_like(logits[:, :1]) if before is None else before
                logits = torch.cat([first, logits[:, :-1]], dim=1)
            logits[..., mask] = -torch.inf
            probabilities = torch.softmax(logits.float(), dim=-1)
            confidence, token = probabilities.max(dim=-1)
            confidence = confidence.masked_fill(~masked, -torch.inf)
            quota = -(-int(masked.sum()) // left)
            chosen = torch.topk(confidence, quota, dim=-1).indices
            block.scatter_(1, chosen, token.gather(1, chosen))
        canvas = torch.cat([canvas[:, :start], block], dim=1)
    return canvas[0, length : length + new]
