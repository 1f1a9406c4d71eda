"""Denoising for transformers' streamers: text that is final, and drafts for those that take them.

This module travels inside the published modelling file, so it imports torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .options import Decoded, DecodingOptions, Observer, Progress


class StreamerFeed:
    """An observer that hands a streamer what `generate` of transformers' own diffusion models does.

    `put` gets the prompt, then new tokens from left to right as soon as nothing can change them;
    `put_draft`, where the streamer has one (`TextDiffusionStreamer`), gets what follows them after
    every forward, the mask token where nothing is written: the rest of the block, or of the text.

    Args:
        streamer: What has `put` and `end`, as `transformers.TextStreamer`.
        prompts: Shape (1, length).
        options: How the text is decoded.
        also: Another observer, called first.

    Raises:
        ValueError: There is not one prompt, or the streamer wants logits, which are not kept.
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
        self._streamer = streamer
        self._drafts = hasattr(streamer, "put_draft")
        self._options = options
        self._also = also
        self._sent = 0
        streamer.put(prompts.cpu())

    def __call__(self, progress: Progress) -> None:
        """Hand on what a forward changed."""
        if self._also is not None:
            self._also(progress)
        start = int(progress.lengths[0])
        committed = progress.committed[0, start:].cpu()
        tokens = progress.canvas[0, start:].masked_fill(
            ~progress.committed[0, start:], self._options.mask_token_id
        )
        tokens = tokens.cpu()
        end = self._end(tokens)
        gaps = (~committed[:end]).nonzero()
        if not len(gaps):
            return
        first = int(gaps[0])
        self._put(tokens[: self._settled(first, start)])
        if self._drafts:
            draft = tokens[self._sent : min(self._block_end(first, start), end)]
            self._streamer.put_draft(value=draft[None])

    def finish(self, rows: torch.Tensor) -> None:
        """Hand on what is left of the new tokens, shape (1, max_new_tokens), and end the stream."""
        tokens = rows[0].cpu()
        self._put(tokens[: self._end(tokens)])
        self._streamer.end()

    def _put(self, tokens: torch.Tensor) -> None:
        if len(tokens) > self._sent:
            self._streamer.put(tokens[self._sent :][None])
            self._sent = len(tokens)

    def _end(self, tokens: torch.Tensor) -> int:
        """Where a text ends: behind its first end-of-text token."""
        ends = torch.isin(tokens, torch.tensor(self._options.eos_token_ids, dtype=tokens.dtype))
        return int(ends.nonzero()[0]) + 1 if ends.any() else len(tokens)

    def _block_end(self, first: int, start: int) -> int:
        size = self._options.block_size
        return int((start + first) // size + 1) * size - start if size else 1 << 62

    def _settled(self, first: int, start: int) -> int:
        """How many new tokens are final, of which `first` are written without a gap."""
        if self._options.remasking is None:
            return first
        size = self._options.block_size
        return max((start + first) // size * size - start, 0) if size else 0


def decode_streamed(
    decode: Callable[..., Decoded],
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None,
    streamer: Any | None,
) -> Decoded:
    """Decode, and let a streamer follow if there is one.

    Args:
        decode: `decode_canvas` or `decode_blocks`.
        model: A diffusion model.
        prompts: Right-padded prompts, shape (batch, width).
        lengths: Tokens of each prompt, shape (batch,).
        options: Decoding options.
        observer: Called at the start and after every forward.
        streamer: What `StreamerFeed` feeds, None if nobody listens.

    Returns:
        New tokens and counts.

    Raises:
        ValueError: A streamer is given and the batch is not one prompt.
    """
    if streamer is None:
        return decode(model, prompts, lengths, options, observer)
    feed = StreamerFeed(streamer, prompts[:, : int(lengths[0])], options, observer)
    decoded = decode(model, prompts, lengths, options, feed)
    feed.finish(decoded.rows)
    return decoded
