"""Attention: change one token, see which positions move, and compare with the claim."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dllm_convert.planning.attention import layer_types
from dllm_convert.verification.instruments.attention import IMPLEMENTATIONS, missing, running
from dllm_convert.verification.report import Probe, none_wrong, skipped
from dllm_convert.verification.subject import Subject

RELATIVE_TOLERANCE = 1e-5
"""Share of the largest logit below which float32 counts as still: about 80 roundings."""
ALL_COLUMNS_UP_TO = 40
FEW_COLUMNS_ABOVE = 200
TOKENS_AT_ONCE = 512
DRAWS = 3
"""Texts tried until every allowed influence shows: one text may hide a weak one by chance."""


def check_influence(subject: Subject) -> list[Probe]:
    """Return the probes `attention-sdpa`, `attention-eager`, `-flex` and `attention-layers`."""
    probes = []
    for name in IMPLEMENTATIONS:
        reason = missing(subject, name)
        if reason:
            probes.append(skipped(f"attention-{name}", "0 pairs wrong", reason))
            continue
        with running(subject, name) as model:
            probes.append(_end_to_end(subject, model, f"attention-{name}"))
            if name == "eager":
                probes.append(_by_layer(subject, model, probe_length(subject)))
    return probes


def probe_length(subject: Subject) -> int:
    """Return a length that crosses blocks and ends inside one, if the context allows."""
    size = subject.claim.block_size
    if size is None:
        return min(24, subject.context)
    whole = 2 * size if size <= FEW_COLUMNS_ABOVE // 2 else size
    length = max(whole + max(size // 2, 1), 8)
    return min(length + (length % size == 0 and size > 1), subject.context)


def probe_lengths(subject: Subject) -> tuple[int, ...]:
    """Return lengths that do not divide into blocks.

    The first is `probe_length`; the others end inside the first block and right after it.
    """
    longest = probe_length(subject)
    size = subject.claim.block_size or longest
    shorter = {size // 2 + 1, size + 1}
    return longest, *sorted(n for n in shorter if 1 < n < longest and n % size)


def probe_columns(length: int, block_size: int | None) -> list[int]:
    """Return which tokens to change: all in a short text, else those around block boundaries."""
    if length <= ALL_COLUMNS_UP_TO:
        return list(range(length))
    size = block_size or length
    edges = {size - 1, size, 2 * size - 1, 2 * size, length - 1}
    if length <= FEW_COLUMNS_ABOVE:
        # Spread over the text by the golden ratio, so that no period is missed.
        edges |= {0} | {int(length * (0.618 * k % 1)) for k in range(1, 4)}
    return sorted(column for column in edges if column < length)


@torch.no_grad()
def measure_influence(
    model: Any, tokens: torch.Tensor, other: torch.Tensor, columns: list[int]
) -> tuple[torch.Tensor, float]:
    """Change one token at a time.

    Args:
        model: Any model with logits.
        tokens: A text, shape (length,).
        other: What each token is changed to, shape (length,).
        columns: Tokens to change.

    Returns:
        Largest change of a logit, shape (length, columns), and the largest logit of the text.
    """
    length = len(tokens)
    per_chunk = max(1, TOKENS_AT_ONCE // length - 1)
    moved: list[torch.Tensor] = []
    scale = 0.0
    for first in range(0, len(columns), per_chunk):
        chunk = torch.tensor(columns[first : first + per_chunk])
        # Row 0 is the text itself: compared inside one batch, equal rows are equal to the bit.
        rows = tokens.repeat(len(chunk) + 1, 1)
        rows[torch.arange(len(chunk)) + 1, chunk] = other[chunk]
        logits = model(rows, use_cache=False).logits
        scale = max(scale, float(logits[0].abs().max()))
        moved.append((logits[1:] - logits[0]).abs().amax(-1).T)
    return torch.cat(moved, dim=1), scale


@dataclass(frozen=True)
class Pattern:
    """A measured pattern beside the claimed one, both of shape (positions, columns).

    Attributes:
        moved: How far each position moved.
        allowed: Where it may move, and must.
        limit: Most it may move elsewhere.
        columns: The token that each column changed.
        rows: The position of each row; None if they are all there, from 0.
    """

    moved: torch.Tensor
    allowed: torch.Tensor
    limit: float
    columns: list[int]
    rows: list[int] | None = None

    @property
    def wrong(self) -> torch.Tensor:
        """Where measured and claimed differ; not-a-number is wrong everywhere."""
        return ((self.moved > self.limit) != self.allowed) | self.moved.isnan()

    @property
    def worst_forbidden(self) -> float:
        """Largest movement where there should be none."""
        return float(self.moved.masked_fill(self.allowed, 0.0).max())

    @property
    def weakest_allowed(self) -> float:
        """Smallest movement where there should be some."""
        return float(self.moved.masked_fill(~self.allowed, torch.inf).min())

    def first_wrong(self) -> str:
        """Describe the first difference, empty if there is none."""
        if not self.wrong.any():
            return ""
        row, index = (int(value) for value in self.wrong.nonzero()[0])
        position = row if self.rows is None else self.rows[row]
        column = self.columns[index]
        if self.allowed[row, index]:
            return f"position {position} does not see token {column}, and should"
        return f"position {position} sees token {column}, and should not"


def observe(
    subject: Subject,
    model: Any,
    text: Callable[[int], torch.Tensor],
    columns: list[int],
    allowed: torch.Tensor,
) -> Pattern:
    """Measure influence over as many texts as it takes for every allowed one to show.

    Args:
        subject: The checkpoint.
        model: As for `measure_influence`.
        text: Returns a text, shape (length,), for the number of the draw.
        columns: Tokens to change.
        allowed: The claim, shape (length, columns).
    """
    moved = torch.zeros(allowed.shape)
    scale = 0.0
    for draw in range(DRAWS):
        tokens = text(draw)
        found, largest = measure_influence(model, tokens, subject.other_tokens(tokens), columns)
        moved, scale = torch.maximum(moved, found), max(scale, largest)
        if not (allowed & (moved <= RELATIVE_TOLERANCE * scale)).any():
            break
    return Pattern(moved, allowed, RELATIVE_TOLERANCE * scale, columns)


def _end_to_end(subject: Subject, model: Any, name: str) -> Probe:
    size = subject.claim.block_size
    patterns: dict[int, Pattern] = {}
    for length in probe_lengths(subject):
        columns = probe_columns(length, size)
        if patterns:
            columns = sorted({0, length - 1, *(c for c in columns if c + 1 in (size, length - 1))})
        text = partial(_text, subject, length)
        allowed = subject.allowed(length)[:, columns]
        patterns[length] = observe(subject, model, text, columns, allowed)
    return pattern_probe(name, patterns)


def _text(subject: Subject, length: int, draw: int) -> torch.Tensor:
    return subject.tokens(1, length, draw=draw)[0]


def pattern_probe(name: str, patterns: Mapping[int, Pattern]) -> Probe:
    """Judge patterns measured at several lengths."""
    found = list(patterns.values())
    wrong = sum(int(pattern.wrong.sum()) for pattern in found)
    pairs = sum(pattern.allowed.numel() for pattern in found)
    closed = max((p.worst_forbidden for p in found if not p.allowed.all()), default=math.inf)
    opened = min(pattern.weakest_allowed for pattern in found)
    limit = max(pattern.limit for pattern in found)
    lengths = ", ".join(str(length) for length in sorted(patterns))
    firsts = (f"{p.first_wrong()} ({n} tokens)" for n, p in patterns.items() if p.wrong.any())
    return Probe(
        name,
        none_wrong(wrong, pairs),
        f"{wrong} of {pairs} pairs wrong at {lengths} tokens: closed {_least(closed)}, "
        f"open {_least(opened)}",
        f"0 pairs: closed up to {limit:.2g}, open above",
        next(firsts, ""),
    )


def _least(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "none"


@torch.no_grad()
def _by_layer(subject: Subject, model: Any, length: int) -> Probe:
    """Look at every layer's weights: one closed layer hides behind an open one end to end."""
    tokens = subject.tokens(2, length)
    layers = model(tokens, use_cache=False, output_attentions=True).attentions or ()
    allowed = subject.allowed(length)
    wrong = 0
    first = ""
    for number, weights in enumerate(layers):
        # Over texts and heads: a softmax may round one allowed weight to zero.
        pattern = Pattern(weights.float().amax(dim=(0, 1)), allowed, 0.0, list(range(length)))
        if pattern.wrong.any():
            wrong += 1
            first = first or f"layer {number}: {pattern.first_wrong()}"
    count = int(subject.config["num_hidden_layers"])
    return Probe(
        "attention-layers",
        none_wrong(wrong, len(layers)) and len(layers) == count,
        f"{wrong} of {len(layers)} layers differ",
        f"0 of {layer_kinds(subject)}",
        first,
    )


def layer_kinds(subject: Subject) -> str:
    """Return how many layers of which kind the config declares, such as `30 full_attention`."""
    kinds = Counter(layer_types(subject.config, subject.adapter))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
