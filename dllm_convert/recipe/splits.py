"""Parts of texts: splits, slices as `datasets` spells them (`train[:10%]`), and their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dllm_convert.common.counts import LARGEST_COUNT

SPLIT = "train"
"""The split that is meant where none is named."""
_SLICE = re.compile(r"(?P<name>[^\[\]]*)\[(?P<rows>[^\[\]]*)\]")
_BOUND = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<percent>%?)|")


@dataclass(frozen=True)
class Rows:
    """Which rows of a split are meant.

    Attributes:
        start: The first one; rows, or parts of a hundred.
        stop: The first one that is not; None for the end.
        start_percent: Whether `start` is a percentage.
        stop_percent: Whether `stop` is one.
    """

    start: float = 0
    stop: float | None = None
    start_percent: bool = False
    stop_percent: bool = False

    @property
    def relative(self) -> bool:
        """Whether they can be found only where the number of all rows is known."""
        return self.start_percent or self.stop_percent

    def of(self, total: int | None) -> tuple[int, int | None]:
        """Return the first row and the first one beyond, of so many.

        Args:
            total: All rows; None if that is not known, where no bound is a percentage.
        """
        stop = self._bound(self.stop, self.stop_percent, total)
        stop = total if stop is None else stop if total is None else min(stop, total)
        start = self._bound(self.start, self.start_percent, total) or 0
        return start if stop is None else min(start, stop), stop

    def overlaps(self, other: Rows) -> bool | None:
        """Whether two slices of a split have a row in common; None where its size decides that.

        Args:
            other: The other slice.
        """
        if Rows() in (self, other):
            return True
        units = {
            percent
            for rows in (self, other)
            for value, percent in (
                (rows.start or None, rows.start_percent),
                (rows.stop, rows.stop_percent),
            )
            if value is not None
        }
        if len(units) > 1:
            return None
        begins = self.stop is None or other.start < self.stop
        return begins and (other.stop is None or self.start < other.stop)

    @staticmethod
    def _bound(value: float | None, percent: bool, total: int | None) -> int | None:
        if value is None or not percent:
            return None if value is None else int(value)
        if total is None:
            raise ValueError("a percentage of an unknown number of rows")
        # As `datasets` rounds it: to the nearest row.
        return round(total * value / 100)


def sliced(split: str) -> tuple[str, Rows | None]:
    """Return the name of a split, and which rows of it are meant; None for all.

    Args:
        split: As `train`, `train[:10%]` or `train[100:500]`.

    Raises:
        ValueError: It is no such thing; the message says what is.
    """
    if "[" not in split and "]" not in split:
        return split, None
    found = _SLICE.fullmatch(split)
    bounds = found["rows"].split(":") if found else []
    parsed = [_BOUND.fullmatch(bound.strip()) for bound in bounds]
    if found is None or len(bounds) != 2 or not all(parsed):
        raise ValueError(f"{split!r} is no slice, expected one as train[:10%] or train[100:500]")
    values, percents = [], []
    for bound in parsed:
        number = bound["number"] if bound else None
        percent = bool(bound and bound["percent"])
        value = None if number is None else float(number)
        most = 100 if percent else LARGEST_COUNT
        if value is not None and (value > most or (not percent and value != int(value))):
            raise ValueError(
                f"{split[:80]!r} is no slice: rows are whole numbers up to {LARGEST_COUNT:,}, "
                "percentages up to 100"
            )
        values.append(value)
        percents.append(percent)
    start, stop = values
    if stop is not None and percents[0] == percents[1] and (start or 0) >= stop:
        raise ValueError(f"{split!r} holds no row")
    return found["name"] or SPLIT, Rows(start or 0, stop, *percents)


@dataclass(frozen=True)
class NamedText:
    """One text of a line.

    Attributes:
        name: What it is called.
        subset: Subset of a Hub dataset, None if none is named.
        split: Split, sliced or not, None if none is named.
        weight: Share of a mixture, None if none is given.
    """

    name: str
    subset: str | None = None
    split: str | None = None
    weight: float | None = None

    def __str__(self) -> str:
        """Return the text as it is typed."""
        where = self.split or (SPLIT if self.subset else None)
        part = f":{self.subset + '/' if self.subset else ''}{where}" if where else ""
        return f"{self.name}{part}{'' if self.weight is None else f':{self.weight:.15g}'}"


def mixture_line(mixture: Any) -> str:
    """Return a mixture as one line, which stands for its name.

    Args:
        mixture: A list of mappings, as `data.mixture`; anything else is somebody's mistake, which
            the schema names.
    """
    if not isinstance(mixture, list | tuple):
        return ""
    texts = []
    for part in mixture:
        if not isinstance(part, Mapping) or not isinstance(part.get("source"), str):
            return ""
        weight, split = part.get("weight"), part.get("split")
        known = isinstance(weight, int | float) and not isinstance(weight, bool)
        texts.append(
            NamedText(
                part["source"],
                part.get("subset"),
                None if split == SPLIT else split,
                float(weight) if known and weight is not None else None,
            )
        )
    return ",".join(map(str, texts))
