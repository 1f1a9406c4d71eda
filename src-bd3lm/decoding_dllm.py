"""What a denoising step works with, written by dllm-convert 0.1.0.

The text so far, which tokens become final, the cache behind it; `modeling_dllm.py` runs the steps.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .gated_dllm import sent
from .settings_dllm import (
    Decoded,
    DecodingOptions,
    Observer,
    Progress,
    Watch,
    read_ids,
    shape_logits,
)

# The text while it is being written: tokens, what is still masked, who is done.


class Canvas:
    """Prompts and new tokens of a batch, and one denoising step on any part of them.

    Attributes:
        limits: Columns each row has, shape (batch,); at least prompt and new tokens.
        tokens: Shape (batch, width), the mask where nothing is written.
        masked: Where something is to be written, shape (batch, width), bool: up to where the new
            tokens end that were asked for, which may be inside a block.
        rows: Rows still being written, shape (rows,).
        stops: Column behind the last new token that each row can have, shape (batch,): what ends a
            row early, an end-of-text token aside, shortens it.
        forwards: Forward passes so far; a reader counts those it runs.
    """

    def __init__(
        self,
        prompts: torch.Tensor,
        lengths: torch.Tensor,
        options: DecodingOptions,
        limits: torch.Tensor,
        observer: Observer | None = None,
        width: int | None = None,
    ) -> None:
        self.options, self.lengths, self.observer = options, lengths, observer
        self.limits = limits
        self.prompt_width = prompts.shape[1]
        self.ends = lengths + options.max_new_tokens
        self.stops = self.ends
        self._watch = Watch(options.stops, options.eos_token_ids, lengths)
        self._is_late = False
        batch, width = len(prompts), int(limits.max()) if width is None else width
        self.index = torch.arange(width, device=prompts.device)
        self.given = self.index < lengths[:, None]
        self.tokens = prompts.new_full((batch, width), options.mask_token_id)
        shared = min(self.prompt_width, width)
        self.tokens[:, :shared] = torch.where(
            self.given[:, :shared], prompts[:, :shared], options.mask_token_id
        )
        self.masked = (self.tokens == options.mask_token_id) & (self.index < self.ends[:, None])
        self.rows = torch.arange(batch, device=prompts.device)
        self.forwards = 0
        self.order = torch.zeros_like(self.tokens)
        self._confidence = torch.zeros(batch, width, device=prompts.device)
        self._used = torch.zeros_like(lengths)
        self._budget = torch.zeros_like(lengths)
        self._generators = row_generators(batch, options, prompts.device)
        self._token_generators = row_generators(batch, options, prompts.device, tokens=True)
        self._warpers = make_warpers(options)
        self._eos = sent(options.eos_token_ids, prompts.device)
        self._never = sent(options.suppress_tokens, prompts.device)

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at the text after every forward."""
        return self.observer is not None or self.options.stops.is_set

    def show(self) -> None:
        """End the rows that something ends, and tell the observer, if there is one."""
        if self.options.stops.is_set:
            self._stop_rows()
        if self.observer is None:
            return
        width = int(self.ends.max())
        committed = ~self.masked & (self.index < self.stops[:, None])
        self.observer(
            Progress(
                canvas=self.tokens[:, :width].clone(),
                committed=committed[:, :width],
                lengths=self.lengths,
                ends=self.stops,
                rows=self.rows,
                forwards=self.forwards,
            )
        )

    def _stop_rows(self) -> None:
        options, late = self.options, self._watch.is_late()
        rows, width = self.rows, int(self.ends.max())
        inside = self.index[:width] < self.ends[rows, None]
        gaps = self.masked[rows, :width] & inside
        # How much of each row is final with all before it, (rows,).
        first = torch.where(gaps.any(-1), gaps.int().argmax(-1), self.ends[rows])
        final = first
        if options.remasking is not None:
            # What stands in an open block, or in an open text, may still be taken back.
            size = options.block_size
            open_from = first // size * size if size else torch.zeros_like(first)
            final = torch.where(first < self.ends[rows], open_from, first)
        stops = self.stops.clone()
        tokens = self.tokens[rows].cpu()
        for line, (row, count) in enumerate(zip(rows.tolist(), final.tolist(), strict=True)):
            end = self._watch.end_of(row, tokens[line, :count])
            if end is not None:
                stops[row] = end
        if late:
            self._is_late = True
            written = torch.maximum(first, self.lengths[rows])
            stops[rows] = torch.minimum(stops[rows], written)
        self.stops = stops

    def is_stopped(self, row: int) -> bool:
        """Whether something ended a row, an end-of-text token aside."""
        return self._is_late or bool(self.stops[row] < self.ends[row])

    def read(self, columns: torch.Tensor, *, noise: bool = True) -> torch.Tensor:
        """What the model is shown of the active rows at `columns`, shape (rows, n).

        With guidance the same rows follow once more with their prompts masked: (2 * rows, n).
        """
        rows = self.rows[:, None]
        tokens = self.tokens[rows, columns]
        if self.options.guided:
            hidden = tokens.masked_fill(self.given[rows, columns], self.options.mask_token_id)
            return torch.cat([tokens, hidden])
        if not (noise and self.options.noise_tokens):
            return tokens
        active = [self._generators[row] for row in self.rows.tolist()]
        # Behind its end a row's last block has noise as well.
        return show_noise(tokens, tokens == self.options.mask_token_id, self.options, active)

    def wanted(self, columns: torch.Tensor) -> torch.Tensor:
        """Where the active rows have something to write at `columns`, each shape (rows, n), bool.

        Nothing behind a row's first end-of-text token, which nobody gets, unless remasking may take
        that back.
        """
        masked = self.masked[self.rows[:, None], columns]
        if not len(self._eos) or self.options.remasking:
            return masked
        return masked & (columns < self._text_ends())

    def _text_ends(self) -> torch.Tensor:
        # The column of each active row's first end-of-text token, or the width, (rows, 1).
        return (~self._ended()[self.rows]).sum(-1, keepdim=True)

    def final_lengths(self) -> torch.Tensor:
        """How long the text of each active row will be, as many rows as `read` returns."""
        limits = self.limits[self.rows]
        return torch.cat([limits, limits]) if self.options.guided else limits

    def begin(self, masked: torch.Tensor, beginning: torch.Tensor) -> None:
        """Start counting the steps of a block, or of the text, that write `masked` (rows, n).

        So in the active rows that are `beginning` (rows,).
        """
        rows, count = self.rows[beginning], masked[beginning].sum(-1)
        steps = self.options.max_denoising_steps
        self._budget[rows] = count if steps is None else torch.full_like(count, steps)
        self._used[rows] = 0

    def denoise(self, logits: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor) -> None:
        """Commit what this step commits, of the `columns` that are `masked`, each (rows, width).

        `logits` (n, vocab) are of the masked, row after row, and written over; with guidance those
        without the prompt follow, (2 * n, vocab).
        """
        options = self.options
        logits = logits.float()
        if options.guided:
            given, hidden = logits.chunk(2)
            logits = hidden + options.guidance_scale * (given - hidden)
        if options.rules.is_set:
            logits, masked = self._follow_rules(logits, columns, masked)
        if options.suppress_tokens:
            logits.index_fill_(1, self._never, -torch.inf)
        rows = self.rows.tolist()
        active = [self._generators[row] for row in rows]
        drawing = [self._token_generators[row] for row in rows]
        remaining = masked.sum(-1)
        counts = remaining.tolist()
        ratings = rate_tokens(logits, counts, options, active, self._warpers, drawing)
        left = (self._budget[self.rows] - self._used[self.rows]).clamp(min=1)
        chosen = choose_commits(ratings, masked, (remaining + left - 1) // left, options)
        among = chosen[masked]
        token = logits[among].argmax(-1) if ratings.token is None else ratings.token[among]
        at = self.rows[:, None].expand_as(columns)[chosen], columns[chosen]
        self.tokens[at] = token
        self.masked[at] = False
        self.order[at] = self.forwards
        self._confidence[at] = ratings.confidence[among].float()
        self._used[self.rows[remaining > 0]] += 1
        if options.remasking:
            # Never of a row whose block is written: its states are kept.
            self._take_back(columns, (left > 1) & (remaining > 0), active)

    def _follow_rules(
        self, logits: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (n, vocab) by the rules, and which positions (rows, width) they are of.

        That is all that are `masked`, or where rules are ordered the first of each row.
        """
        rules, rows = self.options.rules, self.rows.tolist()
        if rules.is_ordered:
            first = masked & (masked.cumsum(-1) == 1)
            logits, masked = logits[first[masked]], first
        row, _ = masked.nonzero(as_tuple=True)
        at = columns[masked]  # (n,)
        before = at.tolist()
        final = ~self.masked & (self.index < self.ends[:, None])
        texts, taken = [], 0
        for number, count in zip(rows, masked.sum(-1).tolist(), strict=True):
            if rules.is_ordered and count:
                text = self.tokens[number, : before[taken]]
            else:
                text = self.tokens[number][final[number]]
            texts.append((number, text, count))
            taken += count
        places = at - self.lengths[self.rows[row]]
        new, ends = self.options.max_new_tokens, self.options.eos_token_ids
        return shape_logits(logits, texts, places, rules, eos=ends, new=new), masked

    def _take_back(self, columns: torch.Tensor, may: torch.Tensor, active: list[Any]) -> None:
        rows = self.rows[:, None].expand_as(columns)
        order = self.order[rows, columns]
        written = (order > 0) & (order < self.forwards) & may[:, None]
        back = choose_remasked(self._confidence[rows, columns], written, self.options, active)
        at = rows[back], columns[back]
        self.tokens[at] = self.options.mask_token_id
        self.masked[at] = True
        self.order[at] = 0

    def finished(self, settled: torch.Tensor) -> torch.Tensor:
        """Which active rows need no further forward, shape (rows,), bool.

        A row is done when everything before its end is written: `max_new_tokens`, or the first
        end-of-text token among the new ones, if remasking leaves it (`settled`, (rows,)).
        """
        if self._is_late:
            return torch.ones_like(self.rows, dtype=torch.bool)
        stop = self.stops[self.rows, None]
        if len(self._eos):
            ends = self._text_ends() + 1
            if self.options.remasking:
                ends = torch.where(settled[:, None], ends, stop)
            stop = torch.minimum(stop, ends)
        return ~(self.masked[self.rows] & (self.index < stop)).any(-1)

    def _ended(self) -> torch.Tensor:
        # Where a row is at or past its first end-of-text token, shape (batch, width).
        new = ~self.given & (self.index < self.stops[:, None]) & ~self.masked
        return (torch.isin(self.tokens, self._eos) & new).cumsum(-1) > 0

    def leave(self, done: torch.Tensor) -> torch.Tensor:
        """Let the rows that are done leave; return which of the active rows stay, int."""
        kept = (~done).nonzero().squeeze(-1)
        self.rows = self.rows[kept]
        return kept

    def result(self) -> Decoded:
        """Cut the new tokens out and pad each row after its end."""
        columns = self.lengths[:, None] + self.index[: self.options.max_new_tokens]
        ended = self._ended().gather(1, columns)
        past_end = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
        past_end |= columns >= self.stops[:, None]
        shared = slice(0, self.prompt_width)
        return Decoded(
            rows=self.tokens.gather(1, columns).masked_fill(past_end, self.options.pad_token_id),
            prompts=self.tokens[:, shared],
            order=self.order.gather(1, columns).masked_fill(past_end, 0),
            prompt_order=self.order[:, shared],
            forwards=self.forwards,
            new=(~past_end).sum(-1),
        )


# What a denoising step decides: tokens, which of them become final, which are taken back.


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
        empty: Any = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
        # Below the largest: a cold temperature overflows nothing.
        warped = warpers(empty, logits - logits.amax(-1, keepdim=True))
        likely = warped.softmax(-1)  # (n, vocab)
        token = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for piece, generator in _pieces(counts, token_generators or generators):
            drawn = torch.multinomial(likely[piece], 1, generator=generator)
            token[piece] = drawn.squeeze(-1)
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
        confidence = own.amax(-1)
    else:
        likely = own
        if warpers:
            empty: Any = torch.empty(0, 0, dtype=torch.long, device=logits.device)
            flat = (logits - logits.amax(-1, keepdim=True)).flatten(0, -2)
            likely = warpers(empty, flat).softmax(-1).view_as(logits)
        token = (likely / race).argmax(-1)
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


def _ranks(values: torch.Tensor) -> torch.Tensor:
    # Place of each value (batch, length) in its row, the largest first; of equal ones the left
    # first: the inverse of the permutation that sorts.
    order = values.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


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
) -> torch.Tensor:
    """Choose as `choose_commits` does, where `ratings` are of every position (batch, length).

    None of those that are `closed`, of the same shape. `places`, the numbers of the positions
    (length,), are given where the quota is one: sorting takes longer than to find the best.
    """
    score = ratings.score.masked_fill(closed, -torch.inf)
    if places is not None:
        # Of equal ones the left one, as sorting has it.
        chosen = places == score.argmax(-1, keepdim=True)
    else:
        chosen = _ranks(score) < quota[:, None]
    if options.confidence_threshold is not None:
        chosen = chosen | (ratings.confidence >= options.confidence_threshold)
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
    doubt: torch.Tensor, written: torch.Tensor, options: DecodingOptions
) -> torch.Tensor:
    """Choose the share of the `written` tokens that is doubted most, each (batch, length)."""
    counts = written.sum(-1)  # (batch,)
    # Those that must stay are ranked behind all others, and never reached: a share below 1 of the
    # written ones is taken back.
    ranks = _ranks(doubt.masked_fill(~written, -torch.inf))
    return written & (ranks < (counts * options.remasking_ratio).long()[:, None])


# A KV cache with room: clean tokens are kept, denoising writes behind them and is written over.


class BlockLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room behind the clean tokens.

    `keys` and `values` are the clean tokens only, views of the buffers, shape
    (batch, heads, clean, head_dim).
    """

    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def write(
        self,
        states: tuple[torch.Tensor, torch.Tensor],
        first: int,
        at: tuple[torch.Tensor, torch.Tensor] | None,
        visible: int,
        room: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states (batch, heads, n, width) from column `first` on, or `at` rows and columns.

        Returns views of the first `visible` columns; new buffers have `room` of them.
        """
        buffers = self.buffers
        if buffers is None or buffers[0].shape[-2] < visible:
            buffers = self.buffers = self._make_room(states, max(room, visible))
        for buffer, new in zip(buffers, states, strict=True):
            if at is None:
                buffer[:, :, first : first + new.shape[-2]] = new
            else:
                # (batch, 1), (batch, n); layers may be on several devices.
                row, column = (index.to(new.device) for index in at)
                buffer[row, :, column] = new.transpose(1, 2)
        keys, values = (buffer[:, :, :visible] for buffer in buffers)
        return keys, values

    def _make_room(
        self, states: tuple[torch.Tensor, torch.Tensor], room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (new.new_zeros((*new.shape[:-2], room, new.shape[-1])) for new in states)
        length = self.get_seq_length()
        if length and self.keys is not None and self.values is not None:
            keys[:, :, :length], values[:, :, :length] = self.keys, self.values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return keys, values

    def keep(self, length: int) -> None:
        """Let the first `length` columns be the clean tokens."""
        if self.buffers is not None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        if self.buffers is not None:
            length = self.get_seq_length()
            self.buffers = (self.buffers[0][indices], self.buffers[1][indices])
            self.keep(length)


class BlockCache(Cache):
    """A KV cache that can be read without being extended.

    While `frozen`, new states are written behind the clean tokens, in place, and the next forward
    writes over them: denoising leaves nothing behind, and nothing is copied or cropped.

    Args:
        room: Columns to make at once, so that the buffers never grow.
    """

    frozen: bool = False

    def __init__(self, room: int = 0) -> None:
        super().__init__(layer_class_to_replicate=BlockLayer)
        self.room = room
        self._first: int | None = None
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None
        self._visible = 0

    def place(self, columns: torch.Tensor, visible: int | None = None) -> None:
        """Say at which columns (batch, n) the states of the next forwards go.

        They read the first `visible` columns, by default up to the last one written.
        """
        first = columns[:, 0].tolist()
        level = min(first) == max(first) and columns.shape[1] == int(columns[0, -1]) - first[0] + 1
        seen = int(columns.max()) + 1 if visible is None else visible
        row = torch.arange(len(columns), device=columns.device)[:, None]
        self.put(None if level else (row, columns), seen, first[0])

    def put(
        self, at: tuple[torch.Tensor, torch.Tensor] | None, visible: int, first: int = 0
    ) -> None:
        """Say the same without a look at any column.

        `at` are rows (batch, 1) and columns (batch, n); None those from `first` on, in each row.
        """
        self._first, self._visible, self._at = first, visible, at

    def keep(self, length: int) -> None:
        """Let the first `length` columns be the clean tokens."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.keep(length)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of cache and input, (batch, heads, cached + new, head_dim)."""
        while len(self.layers) <= layer_idx:
            self.layers.append(BlockLayer())
        layer: Any = self.layers[layer_idx]
        first, at, visible = self._first, self._at, self._visible
        if first is None:
            first, at = layer.get_seq_length(), None
            visible = first + key_states.shape[-2]
        keys, values = layer.write((key_states, value_states), first, at, visible, self.room)
        if not self.frozen:
            layer.keep(visible)
        return keys, values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Columns the next forward reads, and where they begin."""
        if self._first is not None:
            return self._visible, 0
        sizes: tuple[int, int] = super().get_mask_sizes(*args, **kwargs)
        return sizes


# Rotary frequencies that depend on a text's length: one set per row, fixed for a decoding.
#
# Dynamic NTK and LongRoPE choose the frequencies of a forward by its longest text, and keep what an
# earlier forward chose. Keys in a cache would then be turned otherwise than the queries that meet
# them, and a row otherwise beside a longer neighbour. Here each row has the frequencies of its own
# length: of the text in a forward, of the final text in a decoding.


_LENGTHS: ContextVar[torch.Tensor | None] = ContextVar("dllm_final_lengths", default=None)


def _kinds(module: Any) -> dict[str | None, str]:
    """Kind of layer to its rotary type, those whose frequencies depend on the length only."""
    found = getattr(module, "rope_type", None)
    kinds = found if isinstance(found, dict) else {None: found}
    return {
        layer: kind
        for layer, kind in kinds.items()
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
    }


def _threshold(module: Any, layer: str | None) -> int:
    """Tokens up to which the frequencies are those of any shorter text."""
    config, kind = module.config, _kinds(module)[layer]
    if kind != "longrope":
        return int(config.max_position_embeddings)
    parameters = config.rope_parameters if layer is None else config.rope_parameters[layer]
    return int(parameters["original_max_position_embeddings"])


def _turned_for(module: Any, layer: str | None, length: int) -> Any:
    """Return a rotary module that stands in for another, with the frequencies of a length."""
    kind = _kinds(module)[layer]
    prefix = "" if layer is None else f"{layer}_"
    old = getattr(module, f"{prefix}inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](
        module.config,
        old.device,
        # As transformers calls it: with a number, the last bits differ.
        seq_len=sent(length, old.device),
        **({} if layer is None else {"layer_type": layer}),
    )
    stand_in = copy.copy(module)
    # As a plain attribute, which is found before the buffer that the copy shares with the module.
    object.__setattr__(stand_in, f"{prefix}inv_freq", frequencies)
    return stand_in


def _rotate(
    module: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **named: Any
) -> Any:
    lengths = _LENGTHS.get()
    layer = args[0] if args else named.get("layer_type")
    rows = position_ids.shape[0]
    if lengths is None or layer not in _kinds(module) or len(lengths) not in (1, rows):
        return type(module).forward(module, x, position_ids, *args, **named)
    forward = inspect.unwrap(type(module).forward)
    limit = _threshold(module, layer)
    kept = lengths.clamp(min=limit)
    if _kinds(module)[layer] == "longrope":
        kept = kept.clamp(max=limit + 1)
    # Which rows have which length: (rows,) on the host, where a decoding has them already.
    kept = kept.expand(rows).cpu()
    parts: tuple[torch.Tensor, ...] | None = None
    with torch.no_grad():
        for length in sorted(set(kept.tolist())):
            at = sent((kept == length).nonzero().squeeze(-1), position_ids.device)
            found = forward(_turned_for(module, layer, length), x, position_ids[at], *args, **named)
            if len(at) == rows:
                return found
            if parts is None:
                parts = tuple(part.new_empty((rows, *part.shape[1:])) for part in found)
            for part, piece in zip(parts, found, strict=True):
                part[at] = piece
    return parts


def depends_on_length(model: Any) -> bool:
    """Whether rotary frequencies depend on the length; from then on each row has its own."""
    known: bool | None = vars(model).get("_length_dependent")
    if known is None:
        found = [module for module in model.modules() if _kinds(module)]
        for module in found:
            module.forward = partial(_rotate, module)
        known = model._length_dependent = bool(found)
    return known


@contextmanager
def final_lengths(model: Any, lengths: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Turn each row of the forwards inside by the frequencies of a length.

    `lengths` returns (rows,) of them, or (1,) for all rows; it is asked only where it matters.
    """
    if not depends_on_length(model):
        yield
        return
    token = _LENGTHS.set(lengths())
    try:
        yield
    finally:
        _LENGTHS.reset(token)


@contextmanager
def own_lengths(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Turn each row by its own length, from positions (rows, length), unless the final is known."""
    if _LENGTHS.get() is not None or not depends_on_length(model) or not positions.numel():
        yield
        return
    with final_lengths(model, lambda: positions.amax(-1) + 1):
        yield


# Denoising for transformers' streamers: text that is final, drafts for those that take them.


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


# What `generate` is given, as a tokenizer returns it.


def given_prompts(
    inputs: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts (batch, length) and where they have tokens, 1 or 0, of the same shape."""
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids are the same: give one of them")
    prompts = input_ids if inputs is None else inputs
    if prompts is None:
        raise ValueError("give input_ids: a prompt of at least one token")
    if not isinstance(prompts, torch.Tensor) or prompts.dim() != 2 or prompts.is_floating_point():
        shape = tuple(getattr(prompts, "shape", ())) or type(prompts).__name__
        raise ValueError(f"input_ids is {shape}, expected token ids of shape (batch, length)")
    mask = torch.ones_like(prompts) if attention_mask is None else attention_mask.long()
    for name, other in (("attention_mask", mask), ("token_type_ids", token_type_ids)):
        if other is not None and other.shape != prompts.shape:
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, input_ids {tuple(prompts.shape)}"
            )
    if token_type_ids is not None and bool((token_type_ids * mask).any()):
        raise ValueError(
            "token_type_ids names a second text; a prompt is one, with 0 at every token"
        )
    return prompts, mask


def left_open(prompts: torch.Tensor, mask: torch.Tensor, closing: Any) -> torch.Tensor:
    """Return the mask (batch, length) without the `closing` ids behind the text of each prompt.

    A prompt of nothing else is left as it is.
    """
    ids = read_ids(closing, "closing_token_ids")
    count = len(ids)
    if not count or prompts.shape[1] <= count:
        return mask
    order = mask.argsort(dim=-1, descending=True, stable=True)
    lengths = mask.sum(-1, keepdim=True)
    places = (lengths - count + torch.arange(count, device=mask.device)).clamp(min=0)
    columns = order.gather(1, places)
    expected = sent(ids, prompts.device)
    closed = (prompts.gather(1, columns) == expected).all(-1, keepdim=True) & (lengths > count)
    return torch.where(closed, mask.scatter(1, columns, 0), mask)
