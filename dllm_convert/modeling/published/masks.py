"""The mask of a converted model: causal across blocks, open inside one."""

from __future__ import annotations

import torch


def see_self(mask: torch.Tensor) -> torch.Tensor:
    """Let each query of a mask (batch, queries, keys) see itself too; (batch, 1, queries, keys)."""
    # A padded query that sees nothing turns a softmax into NaN; seeing itself is harmless, since
    # nobody looks at it.
    queries, keys = mask.shape[-2:]
    own = torch.arange(queries, device=mask.device) + (keys - queries)
    diagonal = own[:, None] == torch.arange(keys, device=mask.device)[None, :]
    return (mask | diagonal).unsqueeze(1)


def block_causal_mask(
    positions: torch.Tensor, valid: torch.Tensor, block_size: int, queries: int
) -> torch.Tensor:
    """Causal across blocks, bidirectional inside a block.

    Args:
        positions: Position of each key in its text, counted from 0, shape (batch, keys), int.
        valid: False at padding, shape (batch, keys), bool.
        block_size: Tokens per block.
        queries: The last `queries` keys are also the queries.

    Returns:
        Boolean mask, shape (batch, 1, queries, keys).
    """
    block = positions // block_size
    return see_self((block[:, -queries:, None] >= block[:, None, :]) & valid[:, None, :])
