"""Decoding by denoising: MDLM over a canvas, BD3LM block by block with one KV cache.

This module travels inside the published modelling file, so it imports torch and transformers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class DecodingOptions:
    """How text is denoised.

    Attributes:
        mask_token_id: Token that stands for "not written yet"; never written itself.
        max_new_tokens: Tokens written per row.
        block_size: Tokens per block, or None for MDLM.
        token_shift: Whether position i is predicted from the hidden state of i-1.
        max_denoising_steps: Forwards per block (BD3LM) or per text (MDLM); None: one token each.
        confidence_threshold: Commit every position at least this likely, at least one per forward
            (Fast-dLLM, arXiv 2505.22618); None: a fixed number per step.
        temperature: 0 takes the likeliest token.
        eos_token_ids: Tokens that end a row.
        pad_token_id: Token that fills a row after its end.
        seed: Row r draws from `seed + r`; None draws from torch's global generator.
    """

    mask_token_id: int
    max_new_tokens: int
    block_size: int | None = None
    token_shift: bool = False
    max_denoising_steps: int | None = None
    confidence_threshold: float | None = None
    temperature: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Decoded:
    """What decoding returns.

    Attributes:
        rows: New tokens, shape (batch, max_new_tokens), padded after the end of each row.
        forwards: Forward passes run, those that fill the cache included.
        tokens: New tokens written, summed over rows, the end-of-text token included.
    """

    rows: torch.Tensor
    forwards: int
    tokens: int


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


def shifted(logits: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Move logits one position to the right, as autoregressive models align them.

    Args:
        logits: Shape (batch, length, vocab), from the hidden states of each position.
        previous: Shape (batch, vocab), from the token before the first position.

    Returns:
        Logits that predict each position, shape (batch, length, vocab).
    """
    return torch.cat([previous[:, None], logits[:, :-1]], dim=1)


def _choose(
    logits: torch.Tensor, options: DecodingOptions, generators: list[torch.Generator | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick a token and its confidence at every position, both of shape (batch, length)."""
    logits = logits.float()
    logits[..., options.mask_token_id] = -torch.inf
    if options.temperature == 0:
        probability, token = logits.softmax(-1).max(-1)
        return token, probability
    probabilities = (logits / options.temperature).softmax(-1)
    token = torch.stack(
        [
            torch.multinomial(row, 1, generator=g).squeeze(-1)
            for row, g in zip(probabilities, generators, strict=True)
        ]
    )
    return token, probabilities.gather(-1, token[..., None]).squeeze(-1)


def _commit(
    confidence: torch.Tensor, masked: torch.Tensor, steps_left: int, threshold: float | None
) -> torch.Tensor:
    """Choose which masked positions become final, shape (batch, length), bool.

    Each row commits enough of its most confident positions to finish in `steps_left` steps and,
    with a threshold, every position at least that sure.
    """
    remaining = masked.sum(-1)
    quota = (remaining + steps_left - 1) // steps_left
    ranked = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(
        -1, ranked, torch.arange(ranked.shape[-1], device=ranked.device).expand_as(ranked)
    )
    if threshold is None:
        return masked & (rank < quota[:, None])
    return masked & ((confidence >= threshold) | (rank < quota.clamp(max=1)[:, None]))


def _ended(rows: torch.Tensor, options: DecodingOptions) -> torch.Tensor:
    """Where a row is at or past its first end-of-text token, shape (batch, length), bool."""
    ends = torch.zeros_like(rows, dtype=torch.bool)
    for eos in options.eos_token_ids:
        ends |= rows == eos
    return ends.cumsum(-1) > 0


def _finish(
    canvas: torch.Tensor, lengths: torch.Tensor, options: DecodingOptions, forwards: int
) -> Decoded:
    """Cut the new tokens out of the canvas and pad each row after its end."""
    index = lengths[:, None] + torch.arange(options.max_new_tokens, device=canvas.device)
    rows = canvas.gather(1, index)
    ended = _ended(rows, options)
    past_end = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
    return Decoded(
        rows.masked_fill(past_end, options.pad_token_id), forwards, int((~past_end).sum())
    )


def _generators(
    rows: int, options: DecodingOptions, device: torch.device
) -> list[torch.Generator | None]:
    if options.seed is None:
        return [None] * rows
    return [torch.Generator(device).manual_seed(options.seed + row) for row in range(rows)]


def decode_canvas(
    model: Any, prompts: torch.Tensor, lengths: torch.Tensor, options: DecodingOptions
) -> Decoded:
    """MDLM decoding (LLaDA, arXiv 2502.09992): all new positions start masked and are filled in.

    Args:
        model: A diffusion model.
        prompts: Right-padded prompts, shape (batch, width).
        lengths: Tokens of each prompt, shape (batch,).
        options: Decoding options; `block_size` is not used.

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
    generators = _generators(batch, options, prompts.device)
    steps = options.max_denoising_steps or options.max_new_tokens
    forwards = 0
    while masked.any():
        logits = model(canvas, attention_mask=valid, position_ids=index, use_cache=False).logits
        if options.token_shift:
            logits = shifted(logits, torch.zeros_like(logits[:, 0]))
        token, confidence = _choose(logits, options, generators)
        chosen = _commit(confidence, masked, max(steps - forwards, 1), options.confidence_threshold)
        canvas = torch.where(chosen, token, canvas)
        masked = masked & ~chosen
        forwards += 1
    return _finish(canvas, lengths, options, forwards)


def decode_blocks(
    model: Any, prompts: torch.Tensor, lengths: torch.Tensor, options: DecodingOptions
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
    generators = _generators(len(prompts), options, prompts.device)
    start = int(lengths.min()) // size * size
    previous: torch.Tensor | None = None
    if start:
        previous = _extend(model, canvas[:, :start], 0, cache)
        forwards += 1
    for first in range(start, blocks * size, size):
        block = canvas[rows, first : first + size]
        masked = index[rows, first : first + size] >= lengths[rows, None]
        active = [generators[row] for row in rows.tolist()]
        block, used = _denoise_block(model, block, masked, first, cache, previous, options, active)
        canvas[rows, first : first + size] = block
        generated = block.masked_fill(~masked, options.mask_token_id)
        stay = (first + size < ends[rows]) & ~_ended(generated, options)[:, -1]
        forwards += used
        if not stay.any():
            break
        previous = _extend(model, block, first, cache)
        forwards += 1
        if not stay.all():
            kept = stay.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            rows, previous = rows[kept], previous[kept]
    return _finish(canvas, lengths, options, forwards)


def _extend(model: Any, tokens: torch.Tensor, first: int, cache: BlockCache) -> torch.Tensor:
    """Run clean `tokens` (batch, n) into the cache; return the last logits, (batch, vocab)."""
    cache.frozen = False
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device).expand_as(tokens)
    output = model(
        tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
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
) -> tuple[torch.Tensor, int]:
    """Fill one block, shape (batch, block); return it and the forwards it took."""
    cache.frozen = True
    positions = torch.arange(first, first + block.shape[1], device=block.device).expand_as(block)
    steps = options.max_denoising_steps or block.shape[1]
    used = 0
    while masked.any():
        logits = model(block, position_ids=positions, past_key_values=cache, use_cache=True).logits
        if options.token_shift:
            logits = shifted(
                logits, torch.zeros_like(logits[:, 0]) if previous is None else previous
            )
        token, confidence = _choose(logits, options, generators)
        chosen = _commit(confidence, masked, max(steps - used, 1), options.confidence_threshold)
        block = torch.where(chosen, token, block)
        masked = masked & ~chosen
        used += 1
    return block, used
