"""What a denoising step decides: tokens, which of them become final, where a row ends.

This module travels inside the published modelling file, so it imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


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
        noise_tokens: What stands where nothing is written yet: 0 the mask; n, for the uniform
            kernel (D3PM, arXiv 2107.03006), tokens drawn anew in every forward from ids below n.
        causal_context: Whether finished blocks are read strictly causally, as they were trained.
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
    noise_tokens: int = 0
    causal_context: bool = False


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


@dataclass(frozen=True)
class Progress:
    """What an observer of decoding is shown, after the prompt and after every denoising forward.

    Attributes:
        canvas: Prompt, then new tokens, of every row, the mask where nothing is written yet; shape
            (batch, longest prompt + max_new_tokens). Prompts start at column 0, whatever their
            padding was. Not to be written to.
        committed: Where a token is final, prompts included, shape (batch, width), bool.
        lengths: Tokens of each prompt: column `lengths[r]` holds row r's first new token.
        rows: Rows still being written, shape (rows,), int.
        forwards: Forward passes run so far.
    """

    canvas: torch.Tensor
    committed: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    forwards: int


Observer = Callable[[Progress], None]


def shifted(logits: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Move logits one position to the right, as autoregressive models align them.

    Args:
        logits: Shape (batch, length, vocab), from the hidden states of each position.
        previous: Shape (batch, vocab), from the token before the first position.

    Returns:
        Logits that predict each position, shape (batch, length, vocab).
    """
    return torch.cat([previous[:, None], logits[:, :-1]], dim=1)


def choose_tokens(
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


def show_noise(
    tokens: torch.Tensor,
    masked: torch.Tensor,
    options: DecodingOptions,
    generators: list[torch.Generator | None],
) -> torch.Tensor:
    """What the model is shown of tokens (batch, length) of which some are not written yet."""
    if not options.noise_tokens:
        return tokens
    drawn = torch.stack(
        [
            torch.randint(
                options.noise_tokens - 1, row.shape, generator=generator, device=tokens.device
            )
            for row, generator in zip(tokens, generators, strict=True)
        ]
    )
    return torch.where(masked, drawn + (drawn >= options.mask_token_id).long(), tokens)


def choose_commits(
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


def find_ended(rows: torch.Tensor, options: DecodingOptions) -> torch.Tensor:
    """Where a row is at or past its first end-of-text token, shape (batch, length), bool."""
    ends = torch.zeros_like(rows, dtype=torch.bool)
    for eos in options.eos_token_ids:
        ends |= rows == eos
    return ends.cumsum(-1) > 0


def cut_new_tokens(
    canvas: torch.Tensor, lengths: torch.Tensor, options: DecodingOptions, forwards: int
) -> Decoded:
    """Cut the new tokens out of the canvas and pad each row after its end."""
    index = lengths[:, None] + torch.arange(options.max_new_tokens, device=canvas.device)
    rows = canvas.gather(1, index)
    ended = find_ended(rows, options)
    past_end = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
    return Decoded(
        rows.masked_fill(past_end, options.pad_token_id), forwards, int((~past_end).sum())
    )


def row_generators(
    rows: int, options: DecodingOptions, device: torch.device
) -> list[torch.Generator | None]:
    """Return a generator per row, or None per row without a seed."""
    if options.seed is None:
        return [None] * rows
    return [torch.Generator(device).manual_seed(options.seed + row) for row in range(rows)]
