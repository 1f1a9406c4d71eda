"""What a denoising step decides: tokens, which of them become final, which are taken back.

This module travels inside the published modelling file, so it imports torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .options import DecodingOptions

Generators = list[torch.Generator | None]

_PIECE = 1 << 20
"""Probabilities that are at hand at once on a CPU."""


@dataclass(frozen=True)
class Ratings:
    """What the model thinks of n positions, each of shape (n,).

    Attributes:
        confidence: Probability of the token that would be written.
        score: What positions are ranked by, the larger the earlier.
        entropy: In nats; empty where no option asks for it.
        token: Token drawn; None for the likeliest, which only committed positions need.
    """

    confidence: torch.Tensor
    score: torch.Tensor
    entropy: torch.Tensor
    token: torch.Tensor | None = None


def row_generators(rows: int, options: DecodingOptions, device: torch.device) -> Generators:
    """Return a generator per row, or None per row without seeds."""
    if not options.seeds:
        return [None] * rows
    return [torch.Generator(device).manual_seed(seed) for seed in options.seeds]


def make_warpers(options: DecodingOptions) -> LogitsProcessorList:
    """The warpers that transformers uses, in its order."""
    warpers = LogitsProcessorList()
    if options.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        warpers.append(TopKLogitsWarper(top_k=options.top_k))
    if options.top_p is not None and options.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=options.top_p))
    if options.min_p is not None:
        warpers.append(MinPLogitsWarper(min_p=options.min_p))
    return warpers


def _pieces(
    counts: list[int], generators: Generators
) -> Iterator[tuple[slice, torch.Generator | None]]:
    # Every row draws for its own positions and from its own generator, so that neither its
    # neighbours nor the width of the batch change what it gets.
    if all(generator is None for generator in generators):
        counts, generators = [sum(counts)], [None]
    first = 0
    for count, generator in zip(counts, generators, strict=True):
        if count:
            yield slice(first, first + count), generator
        first += count


def draw_uniform(
    counts: list[int], generators: Generators, device: torch.device, below: int = 0
) -> torch.Tensor:
    """Draw numbers in [0, 1), or integers from 0 to `below`, for `counts` positions of each row."""
    kind = torch.int64 if below else torch.float32
    drawn = torch.empty(sum(counts), dtype=kind, device=device)
    for piece, generator in _pieces(counts, generators):
        if below:
            drawn[piece].random_(0, below, generator=generator)
        else:
            drawn[piece].uniform_(generator=generator)
    return drawn


def _draw_tokens(
    probabilities: torch.Tensor, counts: list[int], generators: Generators
) -> torch.Tensor:
    token = torch.empty(len(probabilities), dtype=torch.int64, device=probabilities.device)
    for piece, generator in _pieces(counts, generators):
        drawn = torch.multinomial(probabilities[piece], 1, generator=generator)
        token[piece] = drawn.squeeze(-1)
    return token


def show_noise(
    tokens: torch.Tensor, masked: torch.Tensor, options: DecodingOptions, generators: Generators
) -> torch.Tensor:
    """What the model is shown of tokens (batch, length) of which some are not written yet."""
    if not options.noise_tokens:
        return tokens
    counts = masked.sum(-1).tolist()
    drawn = draw_uniform(counts, generators, tokens.device, options.noise_tokens - 1)
    shown = tokens.clone()
    shown[masked] = drawn + (drawn >= options.mask_token_id).long()
    return shown


def _rows_at_once(logits: torch.Tensor) -> int:
    # All probabilities of a batch are tens of megabytes, which on a CPU are written to memory, and
    # often to pages fresh from the system, for one number of each row.
    rows = len(logits) if logits.device.type != "cpu" else _PIECE // logits.shape[-1]
    return max(1, rows)


def _describe(
    probabilities: torch.Tensor, options: DecodingOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    # The entropy of each row and the margin between its two likeliest tokens: each is computed only
    # where an option asks for it, and empty otherwise.
    entropy = margin = probabilities.new_empty(0)
    if options.entropy_bound is not None or options.unmasking == "entropy":
        entropy = torch.special.entr(probabilities).sum(-1)
    if options.unmasking == "margin":
        two = probabilities.topk(2, -1).values
        margin = two[:, 0] - two[:, 1]
    return entropy, margin


def rate_tokens(
    logits: torch.Tensor,
    counts: list[int],
    options: DecodingOptions,
    generators: Generators,
    warpers: LogitsProcessorList,
) -> Ratings:
    """Rate the tokens that could be written.

    Args:
        logits: Shape (n, vocab), positions row after row; the mask's are overwritten.
        counts: Positions of each row.
        options: Decoding options.
        generators: One per row.
        warpers: From `make_warpers`.
    """
    logits[:, options.mask_token_id] = -torch.inf
    token = None
    if options.temperature:
        empty: Any = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
        probabilities = warpers(empty, logits).softmax(-1)
        token = _draw_tokens(probabilities, counts, generators)
        entropy, margin = _describe(probabilities, options)
        confidence = probabilities.gather(-1, token[:, None]).squeeze(-1)
    else:
        pieces = (part.softmax(-1) for part in torch.split(logits, _rows_at_once(logits)))
        parts = ((part.amax(-1), *_describe(part, options)) for part in pieces)
        confidence, entropy, margin = map(torch.cat, zip(*parts, strict=True))
    score = confidence
    if options.unmasking == "margin":
        score = margin
    elif options.unmasking == "random":
        score = draw_uniform(counts, generators, logits.device)
    elif options.unmasking == "entropy":
        score = -entropy
    return Ratings(confidence, score, entropy, token)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    # Place of each value in its row, the largest first; of equal ones the left first.
    order = values.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def choose_commits(
    ratings: Ratings, masked: torch.Tensor, quota: torch.Tensor, options: DecodingOptions
) -> torch.Tensor:
    """Choose which masked positions become final.

    Each row commits its `quota` best positions and, with a threshold or a bound on the entropy,
    every other position that satisfies it.

    Args:
        ratings: Of the masked positions, row after row.
        masked: Where something can be written, shape (batch, length), bool.
        quota: Positions to commit at least, shape (batch,).
        options: Decoding options.

    Returns:
        Shape (batch, length), bool.
    """

    def spread(values: torch.Tensor, fill: float) -> torch.Tensor:
        return values.new_full(masked.shape, fill).masked_scatter_(masked, values)

    chosen = _ranks(spread(ratings.score, -torch.inf)) < quota[:, None]
    if options.confidence_threshold is not None:
        chosen |= spread(ratings.confidence, 0.0) >= options.confidence_threshold
    if options.entropy_bound is not None:
        entropy, order = spread(ratings.entropy, torch.inf).sort(dim=-1, stable=True)
        # The sum of all but the largest bounds what joint writing can lose (arXiv 2505.24857).
        within = (entropy.cumsum(-1) - entropy) <= options.entropy_bound
        chosen |= torch.zeros_like(within).scatter_(-1, order, within)
    return chosen & masked


def choose_remasked(
    confidence: torch.Tensor,
    written: torch.Tensor,
    options: DecodingOptions,
    generators: Generators,
) -> torch.Tensor:
    """Choose which tokens are taken back, shape (batch, length), bool.

    Args:
        confidence: With which each token was written, shape (batch, length).
        written: Tokens that may be taken back, shape (batch, length), bool.
        options: Decoding options with `remasking`.
        generators: One per row.
    """
    counts = written.sum(-1)
    doubt = -confidence
    if options.remasking == "random":
        drawn = draw_uniform(counts.tolist(), generators, written.device)
        doubt = doubt.masked_scatter(written, drawn)
    ranks = _ranks(doubt.masked_fill(~written, -torch.inf))
    return written & (ranks < (counts * options.remasking_ratio).long()[:, None])
