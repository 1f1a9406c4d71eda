"""Two models on the same items: the difference, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dllm_convert.evaluation.ranking import student_quantile

CONFIDENCE = 0.95
"""Of every interval that is reported."""


@dataclass(frozen=True)
class Mean:
    """A mean over items.

    Attributes:
        value: The mean.
        half_width: Of its 95 % confidence interval; infinite for a single item and where all are
            alike, which say nothing of how far they spread.
        items: How many.
    """

    value: float
    half_width: float
    items: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields; what is not a number as null."""
        width = self.half_width if math.isfinite(self.half_width) else None
        return {**asdict(self), "half_width": width}


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of values with Student's interval.

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("no items to take a mean of")
    count = len(values)
    middle = math.fsum(values) / count
    if count < 2:
        return Mean(middle, math.inf, count)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    if variance == 0:
        return Mean(middle, math.inf, count)
    quantile = student_quantile((1 + CONFIDENCE) / 2, count - 1)
    return Mean(middle, quantile * math.sqrt(variance / count), count)


def paired_difference(before: Mapping[Any, float], after: Mapping[Any, float]) -> Mean:
    """Return `after - before` over the items both have.

    Pairing takes out what makes some items hard for either model, so that the interval is as small
    as the items allow.

    Args:
        before: Score of each item.
        after: The same of the other model.

    Raises:
        ValueError: They share no item.
    """
    shared = [item for item in before if item in after]
    return mean_of([after[item] - before[item] for item in shared])
