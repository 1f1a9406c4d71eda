"""What a denoising step decides: tokens, which of them become final, which are taken back."""

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
_COLDEST = 1e-30
"""Temperature that logits are divided by at the least: float32 has no number for a smaller one's
inverse, and at this one a single token is certain already."""
_HOTTEST = 1e30
"""The same at the most: at this one every token is as likely as any other."""
_TOKENS = 0x5DEECE66D
"""What sets the generators of tokens apart from the others of the same seed."""


@dataclass(frozen=True)
class Ratings:
    """What the model thinks of n positions, each of shape (n,).

    Everything is measured on the model's own distribution, the mask ruled out: temperature, top-k,
    top-p and min-p decide what is drawn, not how sure the model is.

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


class ScoreRoom:
    """Where scores of the positions (batch, length) are put to find the best one of each row.

    Attributes:
        places: Numbers of the positions, shape (length,).
        scores: Shape (batch, length + 1). The last column holds what is below every score and above
            that of a closed position: the best one of a row of which nothing is open.
        never: The score of a closed position.
    """

    def __init__(self, batch: int, places: torch.Tensor) -> None:
        self.places, length = places, len(places)
        lowest = torch.finfo(torch.float32).min
        self.scores = torch.full((batch, length + 1), lowest, device=places.device)
        self.never = torch.full((), -torch.inf, device=places.device)


def row_generators(
    rows: int, options: DecodingOptions, device: torch.device, *, tokens: bool = False
) -> Generators:
    """Return a generator per row, or None per row without seeds.

    Tokens have generators of their own: what else is drawn, such as a random order, is then the
    same with and without a temperature.
    """
    if not options.seeds:
        return [None] * rows
    seeds = ((seed + _TOKENS * tokens) % (1 << 63) for seed in options.seeds)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def make_warpers(options: DecodingOptions) -> LogitsProcessorList:
    """The warpers that transformers uses, in its order."""
    warpers = LogitsProcessorList()
    if options.temperature not in (0.0, 1.0):
        within = min(max(float(options.temperature), _COLDEST), _HOTTEST)
        warpers.append(TemperatureLogitsWarper(within))
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(top_k=options.top_k))
    if options.top_p is not None:
        warpers.append(TopPLogitsWarper(top_p=options.top_p))
    if options.min_p is not None:
        warpers.append(MinPLogitsWarper(min_p=options.min_p))
    options.rules.add_warpers(warpers)
    return warpers


def _pieces(
    counts: list[int], generators: Generators
) -> Iterator[tuple[slice, torch.Generator | None]]:
    # Every row draws for its own positions and from its own generator, so that neither its
    # neighbours nor the width of the batch change what it gets.
    if all(generator is None for generator in generators):
        # Torch's global generator: nobody can tell the rows' draws apart, so one draw does for all.
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


def show_noise(
    tokens: torch.Tensor, masked: torch.Tensor, options: DecodingOptions, generators: Generators
) -> torch.Tensor:
    """What the model is shown of tokens (batch, length) of which some are not written yet."""
    if not options.noise_tokens:
        return tokens
    counts = masked.sum(-1).tolist()
    # Any token but the mask, each as likely: ids from the mask's on are one further up, (n,).
    drawn = draw_uniform(counts, generators, tokens.device, options.noise_tokens - 1)
    shown = tokens.clone()
    shown[masked] = drawn + (drawn >= options.mask_token_id).long()
    return shown


def _describe(
    probabilities: torch.Tensor, options: DecodingOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    # Of probabilities (..., vocab) the entropy of each position and the margin between its two
    # likeliest tokens, (...): each computed only where an option asks for it, and empty otherwise.
    entropy = margin = probabilities.new_empty(0)
    if options.entropy_bound is not None or options.unmasking == "entropy":
        entropy = torch.special.entr(probabilities).sum(-1)
    if options.unmasking == "margin":
        two = probabilities.topk(2, -1).values
        margin = two[..., 0] - two[..., 1]
    return entropy, margin


def _rate(
    logits: torch.Tensor, token: torch.Tensor | None, options: DecodingOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Of logits (n, vocab): confidence in the tokens (n,) drawn, or in the likeliest; entropy and
    # margin; each (n,).
    # All probabilities of a batch are tens of megabytes, which on a CPU are written to memory, and
    # often to pages fresh from the system, for one number of each row.
    rows = len(logits) if logits.device.type != "cpu" else _PIECE // logits.shape[-1]
    parts = []
    for first in range(0, max(1, len(logits)), max(1, rows)):
        piece = slice(first, first + max(1, rows))
        part = logits[piece].softmax(-1)
        sure = part.amax(-1) if token is None else part.gather(-1, token[piece, None]).squeeze(-1)
        parts.append((sure, *_describe(part, options)))
    confidence, entropy, margin = map(torch.cat, zip(*parts, strict=True))
    return confidence, entropy, margin


def forbid(logits: torch.Tensor, token: int) -> None:
    """Have a token never be written: its logits (n, vocab) are overwritten, if it has any."""
    logits[:, token : token + 1] = -torch.inf


def likely_tokens(logits: torch.Tensor, warpers: LogitsProcessorList) -> torch.Tensor:
    """What tokens are drawn from, (n, vocab), of logits of that shape."""
    empty: Any = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    # Below the largest: a cold temperature overflows nothing.
    warped: torch.Tensor = warpers(empty, logits - logits.amax(-1, keepdim=True))
    return warped.softmax(-1)


def draw_tokens(likely: torch.Tensor, counts: list[int], generators: Generators) -> torch.Tensor:
    """Draw a token for each row of weights (n, vocab), of which `counts` are of each text; (n,)."""
    token = torch.empty(len(likely), dtype=torch.long, device=likely.device)
    for piece, generator in _pieces(counts, generators):
        token[piece] = torch.multinomial(likely[piece], 1, generator=generator).squeeze(-1)
    return token


def rate_tokens(
    logits: torch.Tensor,
    counts: list[int],
    options: DecodingOptions,
    generators: Generators,
    warpers: LogitsProcessorList,
    token_generators: Generators | None = None,
) -> Ratings:
    """Rate the tokens that could be written.

    A token is drawn from the warped distribution; how sure the model is is measured on its own one:
    confidence is the probability there of the token drawn, as in MaskGIT (arXiv 2202.04200), LLaDA
    (arXiv 2502.09992) and Fast-dLLM (arXiv 2505.22618), where noise and temperature decide the
    token only. So a draw that is left a single token is greedy decoding, and an unlikely token that
    was drawn is not one the model is sure of. Guidance is part of `logits`: it makes another model.
    `logits` (n, vocab) are row after row, `counts` of each row; the mask's are overwritten.
    """
    # What is written is never the mask, however likely the model finds it.
    forbid(logits, options.mask_token_id)
    token = None  # the likeliest, which only the positions that are committed are asked for
    if options.temperature:
        likely = likely_tokens(logits, warpers)
        token = draw_tokens(likely, counts, token_generators or generators)
    # On the logits as they are, not the warped ones: how sure the model itself is.
    confidence, entropy, margin = _rate(logits, token, options)
    is_random = options.unmasking == "random"
    places = draw_uniform(counts, generators, logits.device) if is_random else None
    score = _score(confidence, entropy, margin, places, options)
    return Ratings(confidence=confidence, score=score, entropy=entropy, token=token)


def rate_all(
    logits: torch.Tensor,
    options: DecodingOptions,
    warpers: LogitsProcessorList,
    *,
    race: torch.Tensor | None,
    drawn: torch.Tensor | None,
) -> tuple[torch.Tensor, Ratings]:
    """Take and rate a token for every position, as `rate_tokens` does for those that are masked.

    Args:
        logits: Those of the model, the mask ruled out, shape (..., vocab).
        options: How text is denoised.
        warpers: What temperature, top-k and the like make of logits (n, vocab).
        race: Exponential numbers, shape (..., vocab), where tokens are drawn: the token whose
            number is the smallest beside its probability is distributed as the probabilities are.
        drawn: What a random order ranks by, shape (...).

    Returns:
        Tokens, shape (...), and what the model thinks of them.
    """
    own = logits.softmax(-1)
    if race is None:
        token = logits.argmax(-1)
    else:
        likely = own
        if warpers:
            empty: Any = torch.empty(0, 0, dtype=torch.long, device=logits.device)
            flat = (logits - logits.amax(-1, keepdim=True)).flatten(0, -2)
            likely = warpers(empty, flat).softmax(-1).view_as(logits)
        token = (likely / race).argmax(-1)
    # Of the likeliest token the largest probability: looked up, not searched for once more.
    confidence = own.gather(-1, token[..., None]).squeeze(-1)
    entropy, margin = _describe(own, options)
    score = _score(confidence, entropy, margin, drawn, options)
    return token, Ratings(confidence=confidence, score=score, entropy=entropy)


def _score(
    confidence: torch.Tensor,
    entropy: torch.Tensor,
    margin: torch.Tensor,
    drawn: torch.Tensor | None,
    options: DecodingOptions,
) -> torch.Tensor:
    # What positions are ranked by, the larger the earlier; all of one shape.
    if options.unmasking == "margin":
        return margin
    if options.unmasking == "entropy":
        return -entropy
    return confidence if drawn is None else drawn


def _ranks(values: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    # Place of each value (batch, length) in its row, the largest first; of equal ones the left
    # first: the inverse of the permutation that sorts. `places` are 0 to length - 1, where at hand.
    order = values.argsort(dim=-1, descending=True, stable=True)
    if places is None:
        places = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, places.expand_as(order))


def choose_commits(
    ratings: Ratings, masked: torch.Tensor, quota: torch.Tensor, options: DecodingOptions
) -> torch.Tensor:
    """Choose which masked positions become final.

    Each row commits its `quota` best positions and, with a threshold, every other position that
    reaches it; with a bound on the entropy, as many of the best as keep to it. `ratings` are of the
    `masked` positions (batch, length), row after row; what is returned has that shape.
    """

    def spread(values: torch.Tensor) -> torch.Tensor:
        # From (n,) to (batch, length); what stands where nothing is masked is not looked at.
        return values.new_zeros(masked.shape).masked_scatter_(masked, values)

    bounded = options.entropy_bound is not None
    everywhere = Ratings(
        confidence=spread(ratings.confidence),
        score=spread(ratings.score),
        entropy=spread(ratings.entropy) if bounded else ratings.entropy,
    )
    return choose_among(everywhere, ~masked, quota, options)


def choose_among(
    ratings: Ratings,
    closed: torch.Tensor,
    quota: torch.Tensor,
    options: DecodingOptions,
    *,
    places: torch.Tensor | None = None,
    room: ScoreRoom | None = None,
) -> torch.Tensor:
    """Choose as `choose_commits` does, where `ratings` are of every position (batch, length).

    None of those that are `closed`, of the same shape.

    Args:
        ratings: What the model thinks of every position.
        closed: Positions that are not to be chosen.
        quota: How many each row commits at the least, shape (batch,).
        options: How text is denoised.
        places: The numbers of the positions, shape (length,), where they are at hand.
        room: Given where the quota is one: sorting takes longer than to find the best.
    """
    if room is not None:
        score = room.scores[:, :-1]
        torch.where(closed, room.never, ratings.score, out=score)
        # Of equal ones the left one, as sorting has it.
        chosen = room.places == room.scores.argmax(-1, keepdim=True)
    else:
        score = ratings.score.masked_fill(closed, -torch.inf)
        chosen = _ranks(score, places) < quota[:, None]
    if options.confidence_threshold is not None:
        is_ranked_by = room is not None and ratings.score is ratings.confidence
        sure = score if is_ranked_by else ratings.confidence
        chosen = chosen | (sure >= options.confidence_threshold)
        if is_ranked_by and options.entropy_bound is None:
            return chosen
    elif room is not None and options.entropy_bound is None:
        return chosen  # nothing that is closed
    if options.entropy_bound is not None:
        order = score.argsort(dim=-1, descending=True, stable=True)
        entropy = ratings.entropy.masked_fill(closed, torch.inf).gather(-1, order)
        # The sum of all but the largest bounds what joint writing can lose (arXiv 2505.24857);
        # added up without it, for a difference would lose small ones beside a large one.
        largest = torch.nn.functional.pad(entropy.cummax(-1).values[:, :-1], (1, 0))
        within = torch.minimum(entropy, largest).cumsum(-1) <= options.entropy_bound
        # From the order of `unmasking` back to columns.
        chosen = chosen | torch.zeros_like(within).scatter_(-1, order, within)
    return chosen > closed  # and not closed, in one kernel


def choose_remasked(
    confidence: torch.Tensor,
    written: torch.Tensor,
    options: DecodingOptions,
    generators: Generators,
) -> torch.Tensor:
    """Choose which of the `written` tokens are taken back, each (batch, length).

    `confidence` is what each was written with.
    """
    doubt = -confidence
    if options.remasking == "random":
        drawn = draw_uniform(written.sum(-1).tolist(), generators, written.device)
        doubt = doubt.masked_scatter(written, drawn)
    return doubted_most(doubt, written, options)


def doubted_most(
    doubt: torch.Tensor,
    written: torch.Tensor,
    options: DecodingOptions,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the share of the `written` tokens that is doubted most, each (batch, length).

    `places` are the numbers of the positions, (length,), where they are at hand.
    """
    counts = written.sum(-1)  # (batch,)
    # Those that must stay are ranked behind all others, and never reached: a share below 1 of the
    # written ones is taken back.
    ranks = _ranks(doubt.masked_fill(~written, -torch.inf), places)
    return written & (ranks < (counts * options.remasking_ratio).long()[:, None])
