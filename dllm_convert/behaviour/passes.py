"""Passes that ought to compute the same: padded and alone, block by block and whole.

What is returned is compared by whoever asks, with the tolerance that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.modeling.published.cache import BlockCache


def padded(
    model: Any, texts: Sequence[torch.Tensor], filler: torch.Tensor, *, left: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run texts in one padded batch, and each alone.

    Args:
        model: Any model with logits.
        texts: Each of shape (length,).
        filler: What stands in the padding, shape (texts, longest); ordinary tokens, so that any
            attention to them shows.
        left: Whether the padding stands in front.

    Returns:
        Of each text the logits in the batch and alone, (length, vocabulary).
    """
    rows, mask = filler.clone(), torch.zeros_like(filler)
    width = filler.shape[1]
    for row, alone in enumerate(texts):
        span = slice(width - len(alone), width) if left else slice(0, len(alone))
        rows[row, span], mask[row, span] = alone, 1
    logits = model(rows, attention_mask=mask, use_cache=False).logits
    return [
        (logits[row][mask[row].bool()], model(alone[None], use_cache=False).logits[0])
        for row, alone in enumerate(texts)
    ]


@dataclass(frozen=True)
class Pass:
    """One forward of a decoding.

    Attributes:
        first: Where its block begins.
        logits: Of the block, (1, size, vocabulary).
        cache: As the forward left it; the next changes it.
        clean: Whether the block was clean and extended the cache.
    """

    first: int
    logits: torch.Tensor
    cache: BlockCache
    clean: bool


def block_by_block(
    model: Any, tokens: torch.Tensor, noisy: torch.Tensor, size: int
) -> Iterator[Pass]:
    """Walk over the blocks as decoding does: denoise against a frozen cache, then extend it.

    Args:
        model: A diffusion model.
        tokens: A text, shape (1, length).
        noisy: The same length, what its blocks are before they are clean.
        size: Tokens per block.
    """
    cache = BlockCache()
    length = tokens.shape[1]
    for first in range(0, length, size):
        span = slice(first, min(first + size, length))
        state: dict[str, Any] = {
            "position_ids": torch.arange(length, device=tokens.device)[None, span],
            "past_key_values": cache,
        }
        for text, clean in ((noisy, False), (tokens, True)):
            cache.frozen = not clean
            if not clean and getattr(model, "is_gated", False):
                state["noisy"] = torch.ones_like(text[:, span], dtype=torch.bool)
            logits = model(text[:, span], use_cache=True, **state).logits
            state.pop("noisy", None)
            yield Pass(first, logits, cache, clean)
