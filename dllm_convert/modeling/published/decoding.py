"""Decoding by denoising: MDLM over a canvas, BD3LM block by block with one KV cache."""

from __future__ import annotations

from typing import Any

import torch

from .canvas import Canvas
from .options import Decoded, DecodingOptions, Observer
from .reading import BlockReader, CanvasReader


def decode_canvas(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
) -> Decoded:
    """MDLM decoding (LLaDA, arXiv 2502.09992): all new positions start masked and are filled in.

    Prompts (batch, width) are right-padded, `lengths` (batch,) counts their tokens; masks in them
    are filled in as well. Rows that are done leave the batch.
    """
    canvas = Canvas(prompts, lengths, options, lengths + options.max_new_tokens, observer)
    reader = CanvasReader(model, canvas)
    window = torch.full_like(lengths, -(2**31))
    canvas.show()
    while len(canvas.rows):
        width = int(canvas.ends[canvas.rows].max())
        masked = canvas.masked[canvas.rows, :width]
        if options.block_length:
            number = (canvas.index[:width] - lengths[canvas.rows, None]) // options.block_length
            current = number.masked_fill(~masked, 2**31).amin(-1)
            if options.approximate_cache:
                # In step, so that no row's states are older or newer than they would be alone.
                current = current.amin().expand_as(current)
            masked = masked & (number == current[:, None])
        else:
            current = torch.zeros_like(canvas.rows)
        beginning = window[canvas.rows] != current
        window[canvas.rows] = current
        canvas.begin(masked, beginning)
        logits = reader.read(masked, current, bool(beginning.any()))
        canvas.denoise(logits, canvas.index[:width].expand_as(masked), masked)
        canvas.show()
        done = canvas.finished(torch.zeros_like(beginning))
        if done.any():
            reader.select(canvas.leave(done))
    return canvas.result()


def decode_blocks(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
) -> Decoded:
    """BD3LM decoding (arXiv 2503.09573): block after block, clean blocks in one KV cache.

    Blocks are counted from position 0 of each prompt. The prompt's unfinished tail sits, clean, in
    the first decoded block; a prompt with masks is decoded from its first masked block on. Every
    row is at a block of its own: in one forward some are denoised and others, whose block is
    written, extend the cache; where all are written, the forward that extends the cache denoises
    the next blocks as well. Arguments are those of `decode_canvas`.
    """
    size = options.block_size or 1
    limits = (lengths + options.max_new_tokens + size - 1) // size * size
    canvas = Canvas(prompts, lengths, options, limits, observer)
    reader = BlockReader(model, canvas, size)
    reader.read_prompt()
    canvas.show()
    beginning = torch.ones_like(canvas.rows, dtype=torch.bool)
    while len(canvas.rows):
        columns = reader.columns()
        masked = canvas.masked[canvas.rows[:, None], columns]
        is_open = masked.any(-1)
        logits = None
        if not is_open.any():
            logits = reader.read_ahead(columns)
        if logits is not None:
            columns = reader.columns()
            masked = canvas.masked[canvas.rows[:, None], columns]
            is_open = beginning = torch.ones_like(is_open)
        canvas.begin(masked, beginning)
        if logits is None:
            logits = reader.read(columns, masked, ~is_open)
        if len(logits):
            canvas.denoise(logits, columns, masked)
            canvas.show()
        beginning = ~is_open
        settled = ~canvas.masked[canvas.rows[:, None], columns].any(-1)
        done = canvas.finished(settled)
        if done.any():
            kept = canvas.leave(done)
            reader.select(kept)
            beginning = beginning[kept]
    return canvas.result()
