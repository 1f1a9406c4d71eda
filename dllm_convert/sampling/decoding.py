"""Decoding by denoising: MDLM over a canvas, BD3LM block by block with one KV cache.

This module travels inside the published modelling file, so it imports torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from .choosing import (
    Decoded,
    DecodingOptions,
    Observer,
    Progress,
    choose_commits,
    choose_tokens,
    cut_new_tokens,
    find_ended,
    row_generators,
    shifted,
    show_noise,
)


class BlockCache(DynamicCache):
    """A KV cache that can be read without being written.

    While `frozen`, `update` hands back cached and new states joined and keeps only the cached ones:
    denoising leaves nothing behind, and nothing is copied or cropped.
    """

    frozen: bool = False

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of cache and input, (batch, heads, cached + new, head_dim)."""
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.get_seq_length(layer_idx) == 0:
            return key_states, value_states
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


def decode_canvas(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
) -> Decoded:
    """MDLM decoding (LLaDA, arXiv 2502.09992): all new positions start masked and are filled in.

    Args:
        model: A diffusion model.
        prompts: Right-padded prompts, shape (batch, width).
        lengths: Tokens of each prompt, shape (batch,).
        options: Decoding options; `block_size` is not used.
        observer: Called at the start and after every forward.

    Returns:
        New tokens and counts.
    """
    batch, width = prompts.shape
    index = torch.arange(width + options.max_new_tokens, device=prompts.device).expand(batch, -1)
    ends = lengths + options.max_new_tokens
    canvas = torch.full_like(index, options.mask_token_id)
    canvas[:, :width] = torch.where(index[:, :width] < lengths[:, None], prompts, canvas[:, :width])
    masked = (index >= lengths[:, None]) & (index < ends[:, None])
    valid = (index < ends[:, None]).long()
    generators = row_generators(batch, options, prompts.device)
    steps = options.max_denoising_steps or options.max_new_tokens
    forwards = 0
    every = torch.arange(batch, device=prompts.device)

    def show() -> None:
        if observer:
            observer(Progress(canvas, valid.bool() & ~masked, lengths, every, forwards))

    show()
    while masked.any():
        shown = show_noise(canvas, masked, options, generators)
        logits = model(shown, attention_mask=valid, position_ids=index, use_cache=False).logits
        if options.token_shift:
            logits = shifted(logits, torch.zeros_like(logits[:, 0]))
        token, confidence = choose_tokens(logits, options, generators)
        chosen = choose_commits(
            confidence, masked, max(steps - forwards, 1), options.confidence_threshold
        )
        canvas = torch.where(chosen, token, canvas)
        masked = masked & ~chosen
        forwards += 1
        show()
    return cut_new_tokens(canvas, lengths, options, forwards)


def decode_blocks(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
) -> Decoded:
    """BD3LM decoding (arXiv 2503.09573): block after block, clean blocks in one KV cache.

    Blocks are counted from position 0 of each prompt. The prompt's unfinished tail sits, clean, in
    the first decoded block; a row whose prompt reaches further walks along until its turn comes, so
    every row is decoded as if it were alone. Rows that have ended leave the batch.

    Args:
        model: A diffusion model.
        prompts: Right-padded prompts, shape (batch, width).
        lengths: Tokens of each prompt, shape (batch,).
        options: Decoding options with `block_size`.
        observer: Called after the prompt and after every denoising forward.

    Returns:
        New tokens and counts.
    """
    size = options.block_size or 1
    ends = lengths + options.max_new_tokens
    blocks = int((ends.max() + size - 1) // size)
    index = torch.arange(blocks * size, device=prompts.device).expand(len(prompts), -1)
    canvas = torch.full_like(index, options.mask_token_id)
    shared = min(prompts.shape[1], canvas.shape[1])
    canvas[:, :shared] = torch.where(
        index[:, :shared] < lengths[:, None], prompts[:, :shared], canvas[:, :shared]
    )
    cache, forwards = BlockCache(), 0
    rows = torch.arange(len(prompts), device=prompts.device)
    generators = row_generators(len(prompts), options, prompts.device)
    start = int(lengths.min()) // size * size
    previous: torch.Tensor | None = None
    if start:
        previous = _extend(model, canvas[:, :start], 0, cache, options)
        forwards += 1

    def show(first: int, block: torch.Tensor, masked: torch.Tensor, used: int) -> None:
        if not observer:
            return
        width = int(ends.max())
        written = canvas.clone()
        written[rows, first : first + size] = block
        committed = written != options.mask_token_id
        committed[rows, first : first + size] = ~masked
        committed &= index < ends[:, None]
        observer(Progress(written[:, :width], committed[:, :width], lengths, rows, forwards + used))

    show(0, canvas[rows, :size], index[rows, :size] >= lengths[rows, None], 0)
    for first in range(start, blocks * size, size):
        block = canvas[rows, first : first + size]
        masked = index[rows, first : first + size] >= lengths[rows, None]
        active = [generators[row] for row in rows.tolist()]
        block, used = _denoise_block(
            model, block, masked, first, cache, previous, options, active, show
        )
        canvas[rows, first : first + size] = block
        generated = block.masked_fill(~masked, options.mask_token_id)
        stay = (first + size < ends[rows]) & ~find_ended(generated, options)[:, -1]
        forwards += used
        if not stay.any():
            break
        previous = _extend(model, block, first, cache, options)
        forwards += 1
        if not stay.all():
            kept = stay.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            rows, previous = rows[kept], previous[kept]
    return cut_new_tokens(canvas, lengths, options, forwards)


def _extend(
    model: Any, tokens: torch.Tensor, first: int, cache: BlockCache, options: DecodingOptions
) -> torch.Tensor:
    """Run clean `tokens` (batch, n) into the cache; return the last logits, (batch, vocab)."""
    cache.frozen = False
    index = torch.arange(first + tokens.shape[1], device=tokens.device)
    mask = None
    if options.causal_context:
        seen = index[first:, None] >= index[None, :]
        mask = seen.expand(len(tokens), 1, -1, -1)
    output = model(
        tokens,
        attention_mask=mask,
        position_ids=index[first:].expand_as(tokens),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _denoise_block(
    model: Any,
    block: torch.Tensor,
    masked: torch.Tensor,
    first: int,
    cache: BlockCache,
    previous: torch.Tensor | None,
    options: DecodingOptions,
    generators: list[torch.Generator | None],
    show: Callable[[int, torch.Tensor, torch.Tensor, int], None],
) -> tuple[torch.Tensor, int]:
    """Fill one block, shape (batch, block); return it and the forwards it took."""
    cache.frozen = True
    positions = torch.arange(first, first + block.shape[1], device=block.device).expand_as(block)
    steps = options.max_denoising_steps or block.shape[1]
    used = 0
    while masked.any():
        shown = show_noise(block, masked, options, generators)
        logits = model(shown, position_ids=positions, past_key_values=cache, use_cache=True).logits
        if options.token_shift:
            logits = shifted(
                logits, torch.zeros_like(logits[:, 0]) if previous is None else previous
            )
        token, confidence = choose_tokens(logits, options, generators)
        chosen = choose_commits(
            confidence, masked, max(steps - used, 1), options.confidence_threshold
        )
        block = torch.where(chosen, token, block)
        masked = masked & ~chosen
        used += 1
        show(first, block, masked, used)
    return block, used
