"""Outcome: training lowered the bound on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dllm_convert.verification.report import Probe, skipped
from dllm_convert.verification.subject import Subject

ENOUGH_TOKENS = 64
"""Held-out tokens below which one word more or less decides."""
NORMAL_95 = 1.96
"""Standard errors to either side that hold 95% of a normal distribution."""


class Measured(NamedTuple):
    """A mean over held-out text.

    Attributes:
        mean: Nats per token; not a number where none was recorded.
        half: Half of its 95% interval; None if unknown.
        tokens: Of that text; None if unknown.
    """

    mean: float
    half: float | None
    tokens: int | None


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
    missing = [why for why in (_too_little(before), _too_little(after)) if why]
    if missing and math.isfinite(after[0]):
        return [skipped("quality", required, missing[0])]
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


def _too_little(value: Measured) -> str | None:
    """Say what a measurement lacks to tell one model from another, if it lacks something."""
    if value.tokens is not None and value.tokens < ENOUGH_TOKENS:
        return f"held-out text of {value.tokens} tokens, expected at least {ENOUGH_TOKENS}"
    if value.half is not None and not math.isfinite(value.half):
        return "held-out text of 1 sequence has no interval, expected at least 2 sequences"
    return None


def _nats(quality: Mapping[str, Any], name: str) -> Measured | None:
    """Return a measurement and half its 95% interval."""
    value = quality.get(name)
    if not isinstance(value, Mapping):
        return None
    spread = value.get("stderr", math.nan)
    half = NORMAL_95 * (math.inf if spread is None else float(spread))
    nats, tokens = value["nats_per_token"], value.get("tokens")
    known = None if math.isnan(half) else half
    return Measured(math.nan if nats is None else float(nats), known, tokens)


def _interval(value: Measured) -> str:
    mean, half, _ = value
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ± {half:.2g}"
