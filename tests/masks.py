"""Masks written out, for tests that compare with them."""

from __future__ import annotations

import torch

from dllm_convert.diffusion.attention import StreamMask


def two_stream_mask(blocks: torch.Tensor, segments: torch.Tensor, views: int = 1) -> torch.Tensor:
    """The dense mask of `[noisy, ..., clean]`, with nothing left out."""
    count = views + 1
    stream = torch.arange(1, count + 1) % count
    places = torch.arange(blocks.shape[1]).expand_as(blocks)
    return StreamMask(
        stream.repeat_interleave(blocks.shape[1]).expand(len(blocks), -1),
        *(columns.repeat(1, count) for columns in (blocks, segments, places)),
    ).dense()
