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


_MARGIN = 8
"""Tokens looked at beyond as many as a stop string has bytes: some have no text of their own."""


class StopText:
    """Ends a text with the token that completes one of the stop strings.

    As transformers' `StopStringCriteria`, which looks through the vocabulary for over a second.

    Args:
        tokenizer: Says what tokens are as text.
        strings: The stop strings.
    """

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._window = max(len(string.encode()) for string in strings) + _MARGIN

    def __call__(self, ids: torch.Tensor, scores: Any) -> bool:
        """Whether the last of the ids, shape (1, length), completes one."""
        tail = ids[0, -self._window :].tolist()
        # Half a character is no text yet.
        whole, before = self._text(tail), len(self._text(tail[:-1]).rstrip("\ufffd"))
        places = ((whole.rfind(string), string) for string in self._strings)
        return any(place >= 0 and place + len(string) > before for place, string in places)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


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
