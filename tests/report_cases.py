"""Measurements of everything that can be drawn, written down by hand, as a manifest holds them."""

from __future__ import annotations

import json
import math
from typing import Any

from dllm_convert.logged import Curve
from dllm_convert.observations import (
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


def _level(seen: bool) -> float | None:
    return -1.0 if seen else None
