"""Who reaches whom: change one token, see which positions move, and compare with a claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

STILL = 1e-5
"""Share of the largest value below which float32 counts as still: about 80 roundings."""
TOKENS_AT_ONCE = 512
DRAWS = 3
"""Texts tried until every allowed influence shows: one text may hide a weak one by chance."""


@torch.no_grad()
def measure_influence(
    model: Any, tokens: torch.Tensor, other: torch.Tensor, columns: list[int]
) -> tuple[torch.Tensor, float]:
    """Change one token at a time.

    Args:
        model: Any model with logits.
        tokens: A text, shape (length,), where the model computes.
        other: What each token is changed to, shape (length,).
        columns: Tokens to change.

    Returns:
        Largest change of a logit, shape (length, columns), on the CPU, and the largest logit of
        the text.
    """
    device = tokens.device
    per_chunk = _changed_rows(len(tokens))
    moved: list[torch.Tensor] = []
    scale = 0.0
    for first in range(0, len(columns), per_chunk):
        chunk = torch.tensor(columns[first : first + per_chunk], device=device)
        # Row 0 is the text itself: compared inside one batch, equal rows are equal to the bit.
        rows = tokens.repeat(len(chunk) + 1, 1)
        rows[torch.arange(len(chunk), device=device) + 1, chunk] = other[chunk]
        logits = model(rows, use_cache=False).logits
        scale = max(scale, float(logits[0].abs().max()))
        moved.append((logits[1:] - logits[0]).abs().amax(-1).T.cpu())
    return torch.cat(moved, dim=1), scale


def _changed_rows(length: int) -> int:
    return max(1, TOKENS_AT_ONCE // length - 1)


@torch.no_grad()
def equal_rows(model: Any, tokens: torch.Tensor) -> float:
    """Return by how much equal rows of one batch, as `measure_influence` runs it, differ.

    Nothing, to the bit, where a kernel adds up every row in the same order.

    Args:
        model: As for `measure_influence`.
        tokens: A text, shape (length,).
    """
    logits = model(tokens.repeat(_changed_rows(len(tokens)) + 1, 1), use_cache=False).logits
    return float((logits - logits[0]).abs().max())


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
    def hidden(self) -> torch.Tensor:
        """What may move and has not: another text may show it."""
        return self.allowed & (self.moved <= self.limit)

    @property
    def worst_forbidden(self) -> float:
        """Largest movement where there should be none."""
        return float(self.moved.masked_fill(self.allowed, 0.0).max())

    @property
    def weakest_allowed(self) -> float:
        """Smallest movement where there should be some."""
        return float(self.moved.masked_fill(~self.allowed, torch.inf).min())

    def first_wrong(self, judged: torch.Tensor | None = None) -> str:
        """Describe the first difference, empty if there is none.

        Args:
            judged: Pairs that count; all if None.
        """
        wrong = self.wrong if judged is None else self.wrong & judged
        if not wrong.any():
            return ""
        row, index = (int(value) for value in wrong.nonzero()[0])
        position = row if self.rows is None else self.rows[row]
        verb = "does not see" if self.allowed[row, index] else "sees"
        return f"position {position} {verb} token {self.columns[index]}"


def patterns(
    model: Any,
    text: Callable[[int], torch.Tensor],
    other: Callable[[torch.Tensor], torch.Tensor],
    columns: list[int],
    allowed: torch.Tensor,
) -> Iterator[Pattern]:
    """Yield what the first text shows, the first two together, and so on; whoever asks stops.

    Args:
        model: As for `measure_influence`.
        text: Returns a text, shape (length,), for the number of the draw.
        other: What each token of a text is changed to.
        columns: Tokens to change.
        allowed: The claim, shape (length, columns).
    """
    moved = torch.zeros(allowed.shape)
    scale = 0.0
    for draw in range(DRAWS):
        tokens = text(draw)
        found, largest = measure_influence(model, tokens, other(tokens), columns)
        moved, scale = torch.maximum(moved, found), max(scale, largest)
        yield Pattern(moved, allowed, STILL * scale, columns)
