"""Where a text ends besides at its end token: stop strings, other criteria, and the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Criterion = Callable[[torch.Tensor, Any], Any]
"""A `StoppingCriteria` of transformers: ids of shape (1, length) and None, for there are no scores;
True where the text ends with the last of them."""


@dataclass(frozen=True)
class Stops:
    """What ends a text early.

    Attributes:
        criteria: Asked of every row by itself, prompt included, once for each new token that is
            final with all before it: as autoregressive decoding asks, whatever the order in which
            tokens were written.
        max_time: Seconds after which no further forward is begun; what is written by then from left
            to right is the text.
    """

    criteria: tuple[Criterion, ...] = ()
    max_time: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.criteria) or self.max_time is not None


class Watch:
    """Looks, after every forward of a decoding, which rows have ended.

    Args:
        stops: What ends a text.
        eos: Tokens that end one anyway: what stands behind them is nobody's.
        lengths: Tokens of each prompt, shape (batch,).
    """

    def __init__(self, stops: Stops, eos: tuple[int, ...], lengths: torch.Tensor) -> None:
        self._stops, self._eos = stops, frozenset(eos)
        self._asked = lengths.tolist() if stops.criteria else []
        self._started = time.monotonic()
        self.stopped: set[int] = set()
        """Rows that were ended."""

    def is_late(self) -> bool:
        """Whether the time is up."""
        most = self._stops.max_time
        return most is not None and time.monotonic() - self._started >= most

    def end_of(self, row: int, tokens: torch.Tensor) -> int | None:
        """How long a row's text is, if a criterion ends it.

        Args:
            row: Its number in the batch.
            tokens: What is final of it from its first token on, shape (length,).
        """
        for end in range(self._asked[row] + 1, len(tokens) + 1) if self._asked else ():
            text = tokens[None, :end]
            if any(torch.as_tensor(ends(text, None)).any() for ends in self._stops.criteria):
                return end
            if int(tokens[end - 1]) in self._eos:
                break
            self._asked[row] = end
        return None
