"""Accuracy under parallelism: a sweep over thresholds as one number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

ALPHA = 3.0
"""How fast accuracy below the best counts less (the paper's)."""
LOST = 5.0
"""Points below the accuracy with the least parallelism at which a setting does not count."""


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], best: float) -> float:
    """Return AUP (d3LLM, arXiv 2601.07568): the area under accuracy over tokens per forward.

        AUP = r_1 y_1 + sum over i > 1 of (r_i - r_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2

    with W(y) = min(exp(-3 (1 - y / best)), 1), r rising, and without points that are more than five
    below y_1. A decoder that writes one token per forward has its accuracy.

    Args:
        points: Tokens per forward and accuracy in percent, of each setting, in any order.
        best: The best accuracy that is known of the task, in percent.
    """
    ordered = sorted(points)
    least = ordered[0][1] - LOST
    kept = [(rate, score) for rate, score in ordered if score >= least]

    def weighed(score: float) -> float:
        return score * min(math.exp(-ALPHA * (1 - score / best)), 1.0) if best > 0 else 0.0

    area = kept[0][0] * kept[0][1]
    for (before, low), (rate, score) in pairwise(kept):
        area += (rate - before) * (weighed(low) + weighed(score)) / 2
    return area


def parallelism(
    sweep: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return AUP of each task and metric that was swept, where it is a share from 0 to 1.

    Args:
        sweep: Rows of the sweep; of several batch sizes the first one counts. They write the same,
            and a row that waits for others of its batch takes forwards.
        results: Rows of the models' results, whose scores may be the best that are known.

    Returns:
        `task`, `metric`, `aup`, `best` (both in percent), and the `thresholds` that count.
    """
    points: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for row in sweep:
        if row.get("tokens_per_forward") and row.get("value") is not None:
            found = points.setdefault((row["task"], row["metric"]), {})
            known = float(row["tokens_per_forward"]), 100 * float(row["value"])
            found.setdefault(float(row["threshold"]), known)
    scores: dict[tuple[str, str], list[float]] = {}
    for row in results:
        means = [row[name] for name in ("before", "after") if row.get(name)]
        scores[row["task"], row["metric"]] = [100 * float(m["value"]) for m in means]
    rows = []
    for (task, metric), found in points.items():
        values = [score for _, score in found.values()]
        best = max([*values, *scores.get((task, metric), ())])
        if min(values) < 0 or best > 100:
            continue  # No share of items: a perplexity, a count.
        aup = accuracy_under_parallelism(list(found.values()), best)
        least = min(found.values())[1] - LOST
        counted = sorted(at for at, (_, score) in found.items() if score >= least)
        rows.append(
            {
                "task": task,
                "metric": metric,
                "aup": round(aup, 3),
                "best": round(best, 3),
                "thresholds": counted,
            }
        )
    return rows
