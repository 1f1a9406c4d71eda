"""Held-out NELBO after a minute of training on real text: ours against the textbook's step."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.checks import Check, Options
from benchmarks.gpu.table import Results

GROUP = "quality"
ROWS, LENGTH, SECONDS = 32, 512, 60.0


def checks(options: Options, results: Results) -> Iterator[Check]:
    """Yield both, if there are weights."""
    if options.weights is None:
        return
    for kind in ("ours", "textbook-full"):
        yield Check(kind, partial(measure, options, results, kind))


def measure(options: Options, results: Results, kind: str) -> None:
    """Train for a minute and measure, as `benchmarks.quality` does."""
    from benchmarks.quality import run

    rows, length, budget = (2, 64, 2.0) if options.tiny else (ROWS, LENGTH, SECONDS)
    fields = [f"data.sequence_length={length}"]
    asked = argparse.Namespace(
        converted=options.weights,
        data=options.data,
        set=[*fields, f"training.batch_size={rows}"],
        common=fields,
        rows=rows,
        seed=0,
        base=True,
    )
    for found in run(asked, kind, [budget]):
        name = f"{kind}, {found['steps']} steps of {rows} x {length} in {budget:.0f} s"
        results.add(GROUP, f"{name}: NELBO", found["nats_per_token"], "nats/token")
        rate = found["steps"] * rows * length / budget
        results.add(GROUP, f"{name}: tokens", rate, "tokens/s")
