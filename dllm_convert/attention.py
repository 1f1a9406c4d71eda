"""Attention masks as functions of indices: bidirectional, block-causal, two-stream training.

Every function returns a boolean tensor of shape (batch, 1, queries, keys), True where the query may
look. Block diffusion's masks are those of BD3LM (arXiv 2503.09573, section 4 and figure 3).
"""

from __future__ import annotations

import torch


def _see_self(mask: torch.Tensor) -> torch.Tensor:
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
    return _see_self((block[:, -queries:, None] >= block[:, None, :]) & valid[:, None, :])


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """Bidirectional inside a document; nothing sees padding or a packed neighbour.

    Args:
        segments: Document of each token, -1 at padding, shape (batch, length).

    Returns:
        Boolean mask, shape (batch, 1, length, length).
    """
    same = segments[:, :, None] == segments[:, None, :]
    return _see_self(same & (segments >= 0)[:, None, :])


def causal_mask(segments: torch.Tensor) -> torch.Tensor:
    """Causal inside a document, for the base model's own likelihood.

    Args:
        segments: Document of each token, -1 at padding, shape (batch, length).

    Returns:
        Boolean mask, shape (batch, 1, length, length).
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    return document_mask(segments) & (index[:, None] >= index[None, :])


def two_stream_mask(blocks: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """BD3LM's training mask over `[noisy ; clean]`.

    A noisy query sees its own noisy block and the clean tokens of earlier blocks; a clean query
    sees the clean tokens of its own and earlier blocks and never anything noisy.

    Args:
        blocks: Number of each token's block, rising along the row, shape (batch, length).
        segments: Number of each token's document, -1 at padding, shape (batch, length).

    Returns:
        Boolean mask, shape (batch, 1, 2 * length, 2 * length).
    """
    query, key = blocks[:, :, None], blocks[:, None, :]
    readable = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
    noisy = torch.cat([(query == key) & readable, (query > key) & readable], dim=-1)
    clean = torch.cat([torch.zeros_like(readable), (query >= key) & readable], dim=-1)
    return _see_self(torch.cat([noisy, clean], dim=-2))
