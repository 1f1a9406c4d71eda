"""Outcome: training lowered the bound on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dllm_convert.verify.report import Probe, skipped
from dllm_convert.verify.subject import Subject

NORMAL_95 = 1.96
"""Standard errors to either side that hold 95% of a normal distribution."""


def check_quality(subject: Subject) -> list[Probe]:
    """Return the probe `quality`: the run's measurements, each with its 95% interval."""
    required = "below that before training"
    if subject.untrained:
        return [skipped("quality", required, "the weights were not trained")]
    before, after, base = (
        _nats(subject.quality, name) for name in ("nelbo_before", "nelbo_after", "ar_nll")
    )
    if before is None or after is None:
        return [skipped("quality", required, "no held-out measurement is recorded")]
    notes = [] if base is None else [f"the base's own NLL on the same tokens is {_interval(base)}"]
    if after[1] is not None and before[1] is not None:
        apart = before[0] - after[0] > math.hypot(after[1], before[1])
        notes += ["± is half a 95% interval"] if apart else ["the 95% intervals overlap"]
    return [
        Probe(
            "quality",
            after[0] < before[0],
            f"held-out NELBO {_interval(after)} nats per token",
            f"below {_interval(before)}, before training",
            "; ".join(notes),
        )
    ]


def _nats(quality: Mapping[str, Any], name: str) -> tuple[float, float | None] | None:
    """Return a measurement and half its 95% interval."""
    value = quality.get(name)
    if not isinstance(value, Mapping):
        return None
    spread = value.get("stderr")
    half = None if spread is None else NORMAL_95 * float(spread)
    return float(value["nats_per_token"]), half


def _interval(value: tuple[float, float | None]) -> str:
    mean, half = value
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ± {half:.2g}"
