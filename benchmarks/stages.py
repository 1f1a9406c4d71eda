"""Peak memory of every stage of a run, against what the plan estimates for it.

    python -m benchmarks.stages SOURCE --to bd3lm --block 8 --length 128

Every stage runs in a process of its own: a run is resumable, so each process does the first stage
that is not done. Measured is the high-water mark of resident memory (VmHWM of Linux), of that
process and of those it starts, as if they stood at their peaks together.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.memory import high_water
from dllm_convert.cli.output import write
from dllm_convert.common.tables import Table, text_of
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe


class _Done(BaseException):
    """A stage was recorded."""


def recipe_of(source: str, options: Mapping[str, Any]) -> Recipe:
    """Resolve a recipe of a few steps."""
    return load_recipe(source, overrides={"training.max_minutes": None, **options})


def serve(source: str, out: Path, options: Mapping[str, Any]) -> None:
    """Do the next stage of a run, and print its name and peak in bytes."""
    from dllm_convert.common.console import Reporter
    from dllm_convert.pipeline.run import run
    from dllm_convert.pipeline.workspace import Workspace

    real = Workspace.record

    def record(self: Workspace) -> None:
        real(self)
        if self.stages:
            raise _Done(self.stages[-1]["name"])

    setattr(Workspace, "record", record)  # noqa: B010
    try:
        run(recipe_of(source, options), out, Reporter(quiet=True))
    except _Done as done:
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        write(f"{done} {high_water() + children}")


def planned(source: str, options: Mapping[str, Any]) -> dict[str, int]:
    """Return what the plan says of a CPU, stage to bytes."""
    from dllm_convert.pipeline.run import plan_conversion
    from dllm_convert.planning.devices import this_cpu
    from dllm_convert.planning.estimate import estimate

    found = estimate(plan_conversion(recipe_of(source, options)), this_cpu())
    if found is None:
        raise SystemExit(f"{source} tells no shapes")
    return {row["stage"]: row["device"] for row in found["stages"] if row["on"] == "cpu"}


def measure(source: str, out: Path, options: Mapping[str, Any]) -> dict[str, int]:
    """Do a whole run, each stage in a process of its own; return stage to bytes."""
    line = [sys.executable, "-m", "benchmarks.stages", source, "--serve", str(out)]
    peaks: dict[str, int] = {}
    while "verify" not in peaks:
        done = subprocess.run(
            [*line, "--options", json.dumps(dict(options))],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        name, peak = done.stdout.split()[-2:]
        peaks[name] = int(peak)
    return peaks


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--to", default="bd3lm", choices=["mdlm", "bd3lm"])
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--method", default="full", choices=["full", "lora"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.source, asked.serve, asked.options)
        return
    options = {
        "target": asked.to,
        "block_size": asked.block if asked.to == "bd3lm" else None,
        "training.method": asked.method,
        "training.batch_size": asked.batch,
        "training.steps": 2,
        "data.sequence_length": asked.length,
        "data.held_out_sequences": 2 * asked.batch,
    }
    guesses = planned(asked.source, options)
    with tempfile.TemporaryDirectory() as folder:
        peaks = measure(asked.source, Path(folder) / "out", options)
    rows = [
        (name, f"{guess / 1e9:.2f}", f"{peaks[name] / 1e9:.2f}", f"{guess / peaks[name]:.3f}")
        for name, guess in guesses.items()
    ]
    write(text_of([Table(("stage", "estimate", "peak", "estimate / peak"), rows)]))


if __name__ == "__main__":
    main()
