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
    *,
    reader: Any = None,
) -> Decoded:
    """MDLM decoding (LLaDA, arXiv 2502.09992): all new positions start masked and are filled in.

    Prompts (batch, width) are right-padded, `lengths` (batch,) counts their tokens; masks in them
    are filled in as well. Rows that are done leave the batch. `reader` makes what runs the
    forwards, of the model and the canvas; by default a `CanvasReader`.
    """
    limits = lengths + options.max_new_tokens
    canvas = Canvas(prompts, lengths, options, limits=limits, observer=observer)
    reader = (reader or CanvasReader)(model, canvas)
    # The window each row was in last, (batch,); none yet, so that every row begins one.
    window = torch.full_like(lengths, -(2**31))
    canvas.show()
    while len(canvas.rows):
        # As wide as the longest text still written: rows that left make the others cheaper.
        width = int(canvas.ends[canvas.rows].max())
        columns = canvas.index[:width].expand(len(canvas.rows), -1)
        masked = canvas.wanted(columns)
        if options.block_length:
            # Windows are counted from each row's first new token, masks in a prompt lie in negative
            # ones: the number of every column, (rows, width), and the first with a mask, (rows,).
            number = (canvas.index[:width] - lengths[canvas.rows, None]) // options.block_length
            current = number.masked_fill(~masked, 2**31).amin(-1)
            if options.approximate_cache:
                # In step, so that no row's states are older or newer than they would be alone.
                current = current.amin().expand_as(current)
            masked = masked & (number == current[:, None])
        else:
            current = torch.zeros_like(canvas.rows)
        # A row that enters a window, or begins at all, counts its steps anew.
        beginning = window[canvas.rows] != current
        window[canvas.rows] = current
        canvas.begin(masked, beginning)
        logits = reader.read(masked, current, bool(beginning.any()))
        canvas.denoise(logits, columns, masked)
        canvas.show()
        # Nothing is settled before all is written: remasking may take any token back.
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
    *,
    reader: Any = None,
) -> Decoded:
    """BD3LM decoding (arXiv 2503.09573): block after block, clean blocks in one KV cache.

    Blocks are counted from position 0 of each prompt. The prompt's unfinished tail sits, clean, in
    the first decoded block; a prompt with masks is decoded from its first masked block on. Every
    row is at a block of its own: in one forward some are denoised and others, whose block is
    written, extend the cache; where all are written, the forward that extends the cache denoises
    the next blocks as well. With `sub_block_size` a block is written part after part, each with
    steps of its own. Arguments are those of `decode_canvas`; `reader` makes a `BlockReader`, of the
    block size too.
    """
    size = options.block_size or 1
    # Whole blocks: behind its last new token a row has masks, which nothing is written into.
    limits = (lengths + options.max_new_tokens + size - 1) // size * size
    canvas = Canvas(prompts, lengths, options, limits=limits, observer=observer)
    reader = (reader or BlockReader)(model, canvas, size)
    reader.read_prompt()
    canvas.show()
    # Rows whose block is new to them, (rows,): their steps are counted from here.
    beginning = torch.ones_like(canvas.rows, dtype=torch.bool)
    # The part of its block that each row writes, (batch,).
    parts = torch.zeros_like(lengths)
    while len(canvas.rows):
        columns = reader.columns()  # of the block each row is at, (rows, block)
        masked = canvas.wanted(columns)
        is_open = masked.any(-1)  # (rows,)
        masked = canvas.in_turn(columns, masked)
        logits = None
        if not is_open.any():
            logits = reader.read_ahead(columns)
        if logits is not None:
            # The written blocks are in the cache, and every row stands at the next one.
            columns = reader.columns()
            masked = canvas.in_turn(columns, canvas.wanted(columns))
            is_open = beginning = torch.ones_like(is_open)
        # The one part that each row writes now: a row that enters one counts its steps anew.
        part = canvas.parts(columns).masked_fill(~masked, -1).amax(-1)
        beginning = beginning | (part != parts[canvas.rows])
        parts[canvas.rows] = part
        canvas.begin(masked, beginning)
        if logits is None:
            # Open blocks are denoised beside written ones, which go into the cache.
            logits = reader.read(columns, masked, ~is_open)
        if len(logits):  # none where every block was written and went into the cache
            canvas.denoise(logits, columns, masked)
            canvas.show()
        beginning = ~is_open
        # What remasking left in a block that is now written, nothing takes back, (rows,).
        settled = ~canvas.masked[canvas.rows[:, None], columns].any(-1)
        done = canvas.finished(settled)
        if done.any():
            kept = canvas.leave(done)
            reader.select(kept)
            beginning = beginning[kept]
    return canvas.result()
