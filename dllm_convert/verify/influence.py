"""Attention: change one token, see which positions move, and compare with the claim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.verify.report import Probe
from dllm_convert.verify.subject import Subject

RELATIVE_TOLERANCE = 1e-5
"""Share of the largest logit below which float32 counts as still: about 80 roundings."""
ALL_COLUMNS_UP_TO = 40
FEW_COLUMNS_ABOVE = 200
TOKENS_AT_ONCE = 512
DRAWS = 3
"""Texts tried until every allowed influence shows: one text may hide a weak one by chance."""


def check_influence(subject: Subject) -> list[Probe]:
    """Return the probes `attention-sdpa`, `attention-eager` and `attention-layers`."""
    length = probe_length(subject)
    probes = []
    for implementation in subject.adapter.implementations:
        with subject.attention(implementation) as model:
            probes.append(_end_to_end(subject, model, f"attention-{implementation}", length))
            if implementation == "eager":
                probes.append(_by_layer(subject, model, length))
    return probes


def probe_length(subject: Subject) -> int:
    """Return a length that crosses blocks and ends inside one, if the context allows."""
    size = subject.claim.block_size
    if size is None:
        return min(24, subject.context)
    whole = 2 * size if size <= FEW_COLUMNS_ABOVE // 2 else size
    length = max(whole + max(size // 2, 1), 8)
    return min(length + (length % size == 0 and size > 1), subject.context)


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
    """

    moved: torch.Tensor
    allowed: torch.Tensor
    limit: float
    columns: list[int]

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
        position, index = (int(value) for value in self.wrong.nonzero()[0])
        column = self.columns[index]
        if self.allowed[position, index]:
            return f"position {position} does not see token {column}, and should"
        return f"position {position} sees token {column}, and should not"


def _end_to_end(subject: Subject, model: Any, name: str, length: int) -> Probe:
    columns = probe_columns(length, subject.claim.block_size)
    allowed = subject.claim.mask(length)[:, columns]
    moved = torch.zeros(length, len(columns))
    scale = 0.0
    for draw in range(DRAWS):
        tokens = subject.tokens(1, length, draw=draw)[0]
        found, largest = measure_influence(model, tokens, subject.other_tokens(tokens), columns)
        moved, scale = torch.maximum(moved, found), max(scale, largest)
        pattern = Pattern(moved, allowed, RELATIVE_TOLERANCE * scale, columns)
        silent = allowed & (moved <= pattern.limit)
        if not silent.any():
            break
    closed = pattern.worst_forbidden if not allowed.all() else math.inf
    return Probe(
        name,
        not pattern.wrong.any(),
        f"{int(pattern.wrong.sum())} of {allowed.numel()} pairs wrong: closed {_least(closed)}, "
        f"open {_least(pattern.weakest_allowed)}",
        f"0 pairs: closed up to {pattern.limit:.2g}, open above",
        pattern.first_wrong(),
    )


def _least(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "none"


@torch.no_grad()
def _by_layer(subject: Subject, model: Any, length: int) -> Probe:
    """Look at every layer's weights: one closed layer hides behind an open one end to end."""
    tokens = subject.tokens(2, length)
    layers = model(tokens, use_cache=False, output_attentions=True).attentions or ()
    allowed = subject.claim.mask(length)
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
        wrong == 0 and len(layers) == count,
        f"{wrong} of {len(layers)} layers differ",
        f"0 of {count}",
        first,
    )
