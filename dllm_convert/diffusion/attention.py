"""Attention masks of training and scoring, as functions of indices. They do not travel.

Every function returns a boolean tensor of shape (batch, 1, queries, keys), True where the query may
look. Block diffusion's masks are those of BD3LM (arXiv 2503.09573, section 4 and figure 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dllm_convert.modeling.published.masks import see_self


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """Bidirectional inside a document; nothing sees padding or a packed neighbour.

    Args:
        segments: Document of each token, -1 at padding, shape (batch, length).

    Returns:
        Boolean mask, shape (batch, 1, length, length).
    """
    same = segments[:, :, None] == segments[:, None, :]
    return see_self(same & (segments >= 0)[:, None, :])


def causal_mask(segments: torch.Tensor) -> torch.Tensor:
    """Causal inside a document, for the base model's own likelihood.

    Args:
        segments: Document of each token, -1 at padding, shape (batch, length).

    Returns:
        Boolean mask, shape (batch, 1, length, length).
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    return document_mask(segments) & (index[:, None] >= index[None, :])


CLEAN, UNUSED = 0, -1


@dataclass(frozen=True)
class StreamMask:
    """Who sees whom in training: noisy views and, in BD3LM, one clean stream, in any order.

    A noisy query sees its own block in its own view and the clean tokens of earlier blocks; a clean
    query sees the clean tokens of its own and earlier blocks and never anything noisy. Nobody sees
    another document. All fields have one entry per token, shape (batch, width), int.

    Attributes:
        streams: `CLEAN`, a view's number from 1, or `UNUSED`.
        blocks: Number of each token's block, rising along its document.
        segments: Number of each token's document, -1 at padding.
        positions: Position of each token in its document, from 0.
        causal_clean: A clean query sees of its own block only what stands before it.
        shut: Pairs of positions (query, key) that stay closed, shape (length, length), bool.
    """

    streams: torch.Tensor
    blocks: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    causal_clean: bool = False
    shut: torch.Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether everybody sees everybody in their row: one view of one whole document."""
        if self.shut is not None:
            return False
        columns = (self.streams, self.blocks, self.segments)
        alike = all(bool((column == column[:, :1]).all()) for column in columns)
        return alike and bool((self.streams != CLEAN).all() & (self.segments >= 0).all())

    def allows(self, row: Any, query: Any, key: Any) -> Any:
        """The rule, for indices that are numbers or broadcast together."""
        stream, own_stream = self.streams[row, key], self.streams[row, query]
        block, own_block = self.blocks[row, key], self.blocks[row, query]
        here = block == own_block
        position, own_position = self.positions[row, key], self.positions[row, query]
        if self.causal_clean:
            here = here & ((stream != CLEAN) | (position <= own_position))
        seen = ((stream == CLEAN) & (block < own_block)) | ((stream == own_stream) & here)
        if self.shut is not None:
            seen = seen & ~self.shut[own_position, position]
        same = self.segments[row, key] == self.segments[row, query]
        real = (stream != UNUSED) & (self.segments[row, key] >= 0)
        return (seen & same & real) | (query == key)

    def dense(self) -> torch.Tensor:
        """Boolean mask, shape (batch, 1, width, width)."""
        rows, width = self.streams.shape
        device = self.streams.device
        row = torch.arange(rows, device=device)[:, None, None]
        index = torch.arange(width, device=device)
        mask: torch.Tensor = self.allows(row, index[None, :, None], index[None, None, :])
        return mask.unsqueeze(1)

    def block_mask(self) -> BlockMask:
        """The mask as flex attention reads it."""
        rows, width = self.streams.shape
        return create_block_mask(
            lambda b, _, q, k: self.allows(b, q, k),
            rows,
            None,
            width,
            width,
            device=str(self.streams.device),
        )

    def equals(self, other: StreamMask) -> bool:
        """Whether both are the same rule over the same tokens."""
        return all(
            torch.equal(mine, yours)
            if isinstance(mine, torch.Tensor) and isinstance(yours, torch.Tensor)
            else mine is yours
            for mine, yours in zip(vars(self).values(), vars(other).values(), strict=True)
        )
