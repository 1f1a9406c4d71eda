"""Peak memory of a training, against what the plan estimates for it.

    python -m benchmarks.memory CONVERTED --batches 4 8 --length 128

CONVERTED is a folder that `dllm-convert run SOURCE --no-train` wrote. Every line is one training of
a few steps, through the function that `run` calls, in a process of its own: load, train, write the
result. Measured is the high-water mark of that process's resident memory (VmHWM of Linux), all of
it: the interpreter and its libraries are in the estimate as well.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from dllm_convert.cli.output import write
from dllm_convert.cli.values import parse_assignments
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.common.tables import Table
from dllm_convert.pipeline.run import plan_conversion
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.costs import peak_memory
from dllm_convert.planning.devices import this_cpu
from dllm_convert.planning.estimate import uses_bf16
from dllm_convert.recipe.loading import load_recipe


def plan_of(options: argparse.Namespace, method: str, batch: int) -> ConversionPlan:
    """Plan a training of CONVERTED."""
    settings = json.loads((options.converted / "config.json").read_text())["diffusion"]
    overrides = {
        "target": settings["objective"],
        "block_size": settings["block_size"],
        "training.method": method,
        "training.batch_size": batch,
        "training.steps": options.steps,
        "training.max_minutes": None,
        "data.sequence_length": options.length,
        **parse_assignments(options.set),
    }
    return plan_conversion(load_recipe(str(options.converted), overrides=overrides))


def high_water() -> int:
    """Return the most resident memory that this process ever had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("the system does not say VmHWM")
    return int(found[1]) * 1024


def serve(options: argparse.Namespace) -> None:
    """Train once and print the high-water mark of resident memory, in bytes."""
    from transformers import AutoTokenizer

    from dllm_convert.common.console import Reporter
    from dllm_convert.training.data.text import prepare_data
    from dllm_convert.training.run import train

    plan = plan_of(options, options.serve, options.batches[0])
    tokenizer = AutoTokenizer.from_pretrained(options.converted)
    data = prepare_data(plan.recipe, tokenizer, Reporter(quiet=True), options.work / "data")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        train(plan, data, options.converted, work / "trained", work, Reporter(quiet=True))
    write(str(high_water()))


def measure(work: Path, method: str, batch: int) -> int:
    """Run one training in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]]
    line += ["--serve", method, "--batches", str(batch), "--work", str(work)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def estimated(options: argparse.Namespace, method: str, batch: int) -> int:
    """Estimate the same peak as `check` does, in bytes."""
    plan = plan_of(options, method, batch)
    if plan.shape is None:
        raise SystemExit(f"{options.converted} tells no shapes")
    bf16 = uses_bf16(plan.recipe, this_cpu())
    return peak_memory(plan.shape, plan.recipe, gpu=False, bf16=bf16, flex=False).total


def compare(
    options: argparse.Namespace, work: Path, method: str, batch: int
) -> tuple[str, str, str, str, str]:
    """Return a line of the table, in GB."""
    guess = estimated(options, method, batch)
    peak = measure(work, method, batch)
    shape = f"{batch} x {options.length}"
    return method, shape, f"{guess / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{guess / peak:.3f}"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with quiet_libraries():
        if options.serve:
            serve(options)
            return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = [
            compare(options, work, method, batch)
            for method in options.methods
            for batch in options.batches
        ]
    write(str(Table(("method", "batch", "estimate", "peak", "estimate / peak"), rows)))


if __name__ == "__main__":
    main()
