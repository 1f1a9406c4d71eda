"""Measurements of everything that can be drawn, written down by hand, as a manifest holds them."""

from __future__ import annotations

import json
import math
from typing import Any

from dllm_convert.verification.observe.logged import Curve
from dllm_convert.verification.observe.observations import (
    DecodingPoint,
    Influence,
    InfluenceMap,
    Observations,
    RatePoint,
)

LENGTH, BLOCK = 12, 4


def drawable() -> dict[str, Any]:
    """Return a triangle, a staircase, curves over mask rates and steps, and decoding speeds."""
    index = range(LENGTH)
    triangle = InfluenceMap(tuple(tuple(_level(c <= r) for c in index) for r in index), 1)
    blocks = ((c // BLOCK <= r // BLOCK for c in index) for r in index)
    staircase = InfluenceMap(tuple(tuple(map(_level, row)) for row in blocks), 1)
    rates = (0.1, 0.5, 0.9)
    seen = Observations(
        Influence(staircase, triangle, BLOCK),
        tuple(RatePoint(rate, 8 + rate, 0.1, 50) for rate in rates),
        tuple(RatePoint(rate, 4 + rate, math.inf, 50) for rate in rates),
        tuple(DecodingPoint(t, 1 / (t or 1), t or 1.0, 32) for t in (None, 0.9, 0.88, 0.3)),
        {"loss": Curve((1, 2, 3), (9.0, 7.0, 6.0))},
    )
    return dict(json.loads(json.dumps(seen.as_dict())))


def evaluated() -> dict[str, Any]:
    """Return an evaluation of two tasks beside the base, three thresholds and held-out text."""
    return {
        "settings": {"draws": 8, "rounds": 4, "base": "base"},
        "tasks": {
            "capitals": {"shots": 0, "output_type": "multiple_choice"},
            "copying": {"shots": None, "output_type": "generate_until"},
        },
        "results": [
            {
                "task": "capitals",
                "metric": "acc",
                "before": _mean(0.75, 0.1),
                "after": _mean(0.5, 0.125),
                "difference": _mean(-0.25, 0.0625),
            },
            {"task": "copying", "metric": "exact_match", "after": _mean(0.0, None)},
        ],
        "effort": {"after": {"tokens_per_forward": 1.5, "tokens_per_second": 40.0}},
        "sweep": [
            {
                **_mean(score, 0.1),
                "task": "copying",
                "metric": "exact_match",
                "threshold": threshold,
                "tokens_per_forward": speed,
                "tokens_per_second": None if speed is None else 20 * speed,
            }
            for threshold, score, speed in ((0.5, 0.25, 4.0), (0.9, 0.5, 1.25), (1.0, 0.0, None))
        ],
        "text": {
            "source": "notes",
            "nelbo": {"nats_per_token": 4.5},
            "nll": {"nats_per_token": 3.25},
        },
    }


def _mean(value: float, half_width: float | None) -> dict[str, Any]:
    return {"value": value, "half_width": half_width, "items": 1200}


def _level(seen: bool) -> float | None:
    return -1.0 if seen else None
