"""Denoising for transformers' streamers: text that is final, drafts for those that take them."""

from __future__ import annotations

from typing import Any

import torch

from .options import Decoded, DecodingOptions, Observer, Progress


class StreamerFeed:
    """An observer that hands a streamer what `generate` of transformers' own diffusion models does.

    `put` gets the prompt, then new tokens from left to right as soon as nothing can change them;
    `put_draft`, where the streamer has one (`TextDiffusionStreamer`), gets what follows them after
    every forward, the mask token where nothing is written: the rest of the block, or of the text.

    Raises a ValueError unless there is one prompt, or if the streamer wants logits.
    """

    def __init__(
        self,
        streamer: Any,
        prompts: torch.Tensor,
        options: DecodingOptions,
        also: Observer | None = None,
    ) -> None:
        if len(prompts) != 1:
            raise ValueError(f"a streamer takes one prompt, these are {len(prompts)}")
        if getattr(streamer, "_takes_logits", False):
            raise ValueError("this streamer takes logits; only tokens are streamed")
        self._streamer, self._options, self._also, self._sent = streamer, options, also, 0
        streamer.put(prompts.cpu())

    def __call__(self, progress: Progress) -> None:
        """Hand on what a forward changed."""
        if self._also is not None:
            self._also(progress)
        start = int(progress.lengths[0])
        new = slice(start, int(progress.ends[0]))
        committed = progress.committed[0, new].cpu()
        tokens = progress.canvas[0, new].cpu().masked_fill(~committed, self._options.mask_token_id)
        end = self._end(tokens)
        gaps = (~committed[:end]).nonzero()
        if not len(gaps):
            return
        settled = first = int(gaps[0])
        if size := self._options.block_size:
            begins = (start + first) // size * size - start
            end = min(begins + size, end)
        if self._options.remasking is not None:
            # What stands in an open block, or in an open text, may still be taken back.
            settled = max(begins, 0) if size else 0
        self._put(tokens[:settled])
        if hasattr(self._streamer, "put_draft"):
            self._streamer.put_draft(value=tokens[self._sent : end][None])

    def finish(self, decoded: Decoded) -> None:
        """Hand on what is left of the new tokens, and end the stream."""
        self._put(decoded.rows[0, : int(decoded.new[0])].cpu())
        self._streamer.end()

    def _put(self, tokens: torch.Tensor) -> None:
        if len(tokens) > self._sent:
            self._streamer.put(tokens[self._sent :][None])
            self._sent = len(tokens)

    def _end(self, tokens: torch.Tensor) -> int:
        """Where a text ends: behind its first end-of-text token."""
        ends = torch.isin(tokens, torch.tensor(self._options.eos_token_ids, dtype=tokens.dtype))
        return int(ends.nonzero()[0]) + 1 if ends.any() else len(tokens)
