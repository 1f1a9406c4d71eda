"""The streams of a forward: noisy views and clean text, and which of their columns have to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm_convert.diffusion.attention import UNUSED
from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.diffusion.objective import Objective, TextBatch

WIDTH_MULTIPLE = 16
"""Rows are as wide as a multiple of this many tokens, so that few widths occur; with flex attention
as one of its blocks."""


@dataclass(frozen=True)
class Streams:
    """Noisy views and, in BD3LM, the clean text, side by side in each row: (batch, width)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    segments: torch.Tensor
    streams: torch.Tensor

    def compact(self, keep: torch.Tensor, multiple: int) -> tuple[Streams, torch.Tensor]:
        """Drop what nobody needs; return the rest and each column's new column."""
        # As wide as the row that keeps most, (batch, width).
        needed = max(int(keep.sum(-1).max()), 1)
        width = -(-needed // multiple) * multiple
        if multiple == WIDTH_MULTIPLE:
            width = min(width, keep.shape[1])
        # Kept columns first, in their order (the sort is stable): positions stay ascending.
        order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
        order = torch.nn.functional.pad(order, (0, width - order.shape[1]))
        # Rows that keep fewer are filled up with columns that nobody sees.
        unused = torch.arange(width, device=keep.device) >= keep.sum(-1, keepdim=True)
        columns = {name: values.gather(1, order) for name, values in vars(self).items()}
        columns["streams"] = columns["streams"].masked_fill(unused, UNUSED)
        # Where each old column stands now: the number of kept columns before it.
        return Streams(**columns), keep.long().cumsum(-1) - 1


def corrupted(batch: TextBatch, corruption: Corruption, objective: Objective) -> torch.Tensor:
    """Return the text as a draw of noise leaves it, (batch, length)."""
    if corruption.tokens is not None:
        return corruption.tokens
    return batch.tokens.masked_fill(corruption.scored, objective.mask_token_id)


def needed_columns(
    batch: TextBatch, blocks: torch.Tensor, views: Sequence[Corruption], *, all_clean: bool
) -> torch.Tensor:
    """Which columns of `[views ; clean]` have to run, (batch, (views + 1) * length), bool.

    A noisy block without a scored token, padding, and clean tokens that no scored block of their
    document comes after reach no loss: prompts of a chat, a document's last block.
    """
    text = batch.segments >= 0
    count = int(blocks.max()) + 1
    noisy = []
    for view in views:
        # (batch, blocks): whether any token of a block is scored; then back to its columns.
        scored = torch.zeros(len(blocks), count, dtype=torch.long, device=blocks.device)
        scored.scatter_reduce_(1, blocks, view.scored.long(), "amax")
        noisy.append(scored.gather(1, blocks).bool() & text)
    if all_clean:
        return torch.cat([*noisy, text], dim=1)
    # Clean text is read by later noisy blocks only. `last`, (batch, documents): the last block of a
    # document that runs in some view; what stands before it has a reader.
    runs = torch.stack(noisy).any(0)
    segments = batch.segments.clamp(min=0)
    last = torch.full((len(blocks), int(segments.max()) + 1), -1, device=blocks.device)
    last.scatter_reduce_(1, segments, torch.where(runs, blocks, -1), "amax")
    return torch.cat([*noisy, (blocks < last.gather(1, segments)) & text], dim=1)
