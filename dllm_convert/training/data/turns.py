"""Whose turn it is: which of several texts each row of a training is of."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from fractions import Fraction
from math import lcm


class Turns:
    """An order in which texts take turns, exact after any number of rows.

    After n rows a text of share w had its turn in more than w n - 1 and fewer than w n + 1 of them:
    of the texts that are not ahead of their share the one comes next that would be the first to
    fall behind by too much. That there is always such an order, and that this is one, is Tijdeman's
    (The chairman assignment problem, Discrete Mathematics 32, 1980): no count differs from its
    share by more than 1 - 1/(2m - 2) for m texts. It is computed in whole numbers, and it repeats.

    Args:
        shares: Share of each text, exact; their sum is one.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        if sum(shares) != 1 or min(shares) <= 0:
            raise ValueError(f"shares {', '.join(map(str, shares))}, expected parts of one")
        self._period = lcm(*(share.denominator for share in shares))
        self._parts = [int(share * self._period) for share in shares]
        self._counts = [0] * len(shares)
        # Of the rows of the first period, as far as they were asked for: text, and number in it.
        self._texts, self._numbers = array("H"), array("q")

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Share of each text."""
        return tuple(Fraction(part, self._period) for part in self._parts)

    def of(self, row: int) -> tuple[int, int]:
        """Return the text that a row is of, and which of that text's rows it is."""
        periods, at = divmod(row, self._period)
        self._extend(at + 1)
        text = self._texts[at]
        return text, periods * self._parts[text] + self._numbers[at]

    def counts(self, rows: int) -> tuple[int, ...]:
        """Return how many of the first rows are of each text."""
        periods, rest = divmod(rows, self._period)
        self._extend(rest)
        found = [periods * part for part in self._parts]
        for text in self._texts[:rest]:
            found[text] += 1
        return tuple(found)

    def _extend(self, rows: int) -> None:
        period, parts, counts = self._period, self._parts, self._counts
        slack = 2 * len(parts) - 2
        for row in range(len(self._texts) + 1, rows + 1):
            chosen, least = 0, 0
            found = False
            for text, part in enumerate(parts):
                # `slack * period` times how far the text is behind its share of `row` rows.
                behind = slack * (part * row - period * counts[text])
                if behind < period:
                    continue  # It would be ahead.
                left = (slack - 1) * period - behind
                # Rows until it is too far behind: left / (slack * part), compared without division.
                if not found or left * parts[chosen] < least * part:
                    chosen, least, found = text, left, True
            self._texts.append(chosen)
            self._numbers.append(counts[chosen])
            counts[chosen] += 1
