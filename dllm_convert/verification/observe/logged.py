"""Curves of what training logged in metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import FiniteFloat, model_validator
from pydantic.dataclasses import dataclass

CURVE_POINTS = 200
"""Points of a training curve that the manifest keeps: more than a picture can show."""


@dataclass(frozen=True)
class Curve:
    """One logged quantity, at two steps at least.

    Attributes:
        steps: Optimizer steps.
        values: Nats per token.
    """

    steps: tuple[int, ...]
    values: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.steps) == len(self.values) > 1:
            raise ValueError("no line can be drawn")
        return self

    def thinned(self, most: int = CURVE_POINTS) -> Curve:
        """Return at most `most` points, the first and the last among them."""
        count = len(self.steps)
        if count <= most:
            return self
        kept = [round(i * (count - 1) / (most - 1)) for i in range(most)]
        return Curve(tuple(self.steps[i] for i in kept), tuple(self.values[i] for i in kept))


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_curves(metrics: Path) -> dict[str, Curve]:
    """Read `loss` and `nelbo` from metrics.jsonl; what is broken or missing is left out.

    Args:
        metrics: File of one JSON object per logged step.
    """
    rows: list[Mapping[str, Any]] = []
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    curves = {}
    for name in ("loss", "nelbo"):
        found = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
        if len(found) > 1:
            curves[name] = Curve(*(tuple(column) for column in zip(*found, strict=True)))
    return curves
