"""Whether the package is right on this GPU, and how fast it is. Prints a table last.

    python -m benchmarks.gpu                            # on an H200: less than 8 minutes
    python -m benchmarks.gpu --weights CONVERTED        # quality per second as well: 4 more
    python -m benchmarks.gpu --tiny                     # the logic of this program, on a CPU

Needs the repository and what the package needs to train; nothing is downloaded. CONVERTED is a
folder that `dllm-convert run SOURCE --to bd3lm --no-train` wrote. Each phase runs in a process of
its own, with a time of its own: a phase that breaks or hangs leaves the others. results.json is
written after each line. Exit code 1 if a check of correctness failed, or something broke.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.table import Results, now

PHASES = ("correctness", "training", "decoding", "quality")
"""Each a module here; imported by its own process only."""
SHARES = {"correctness": 0.35, "training": 0.37, "decoding": 0.28}
"""Of the minutes; what one leaves, the next ones get."""
QUALITY_S = 240.0
_GRACE_S = 45.0
"""After a phase's time its last check may end, and then it is ended."""
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "pydantic")


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Say what is measured on and with."""
    cuda = torch.cuda.is_available()
    return {
        "started": now(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "tiny": options.tiny,
        "versions": {name: version(name) for name in _LIBRARIES},
        "cuda": torch.version.cuda,
    }


def results_of(options: argparse.Namespace) -> Results:
    """Open what is there of results.json."""
    known = facts(options)
    judges = "H200" in known["device"].split() and not options.tiny
    return Results(options.out / "results.json", known, judges_speed=judges)


def serve(options: argparse.Namespace) -> None:
    """Run one phase in this process."""
    from benchmarks.gpu.checks import Options, run_checks

    torch.set_float32_matmul_precision("highest")
    if options.tiny:
        torch.set_num_threads(1)
    chosen = Options(options.out, tiny=options.tiny, weights=options.weights, data=options.data)
    results = results_of(options)
    until = time.monotonic() + options.seconds
    phase = import_module(f"benchmarks.gpu.{options.phase}")
    run_checks(options.phase, phase.checks(chosen, results), results, until)


def run_phase(name: str, budget: float) -> str | None:
    """Run a phase in a process of its own; return why it came to no end, None if it did."""
    line = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
    line += ["--phase", name, "--seconds", f"{budget:.0f}"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
    }
    process = subprocess.Popen(line, env=environment)
    try:
        code = process.wait(budget + _GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"ended after {budget + _GRACE_S:.0f} s"
    return f"its process ended with {code}" if code else None


def run(options: argparse.Namespace) -> int:
    """Run all phases, print the table, return the exit code."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").unlink(missing_ok=True)
    ends, left = time.monotonic() + 60 * options.minutes, dict(SHARES)
    for name in dict.fromkeys(options.phases.split(",")):
        if name == "quality":
            budget = QUALITY_S
        else:
            rest = max(ends - time.monotonic(), 1.0)
            budget = rest * left[name] / sum(left.values())
            del left[name]
        began = time.monotonic()
        failure = run_phase(name, budget)
        # What the phase wrote is read back.
        results = results_of(options)
        took = time.monotonic() - began
        if failure:
            results.broke(name, "the phase", failure)
        results.add(name, "time of the phase", round(took), "s", goal=f"{budget:.0f}")
    results = results_of(options)
    print("\n" + results.table(), flush=True)
    return 1 if results.failed else 0


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--minutes", type=float, default=7.5, help="of all phases but quality")
    parser.add_argument("--phases", help=f"some of {','.join(PHASES)}")
    parser.add_argument("--weights", type=Path, help="an untrained conversion, for quality")
    parser.add_argument("--data", default="pydoc", help="text for quality")
    parser.add_argument("--tiny", action="store_true", help="tiny models: for a CPU")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phases is None:
        options.phases = ",".join(PHASES if options.weights else SHARES)
    unknown = set(options.phases.split(",")) - set(PHASES)
    if unknown:
        parser.error(f"no phase {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    if not torch.cuda.is_available() and not options.tiny and not options.reference:
        parser.error("there is no CUDA GPU; --tiny runs the logic of this program on a CPU")
    if "quality" in options.phases.split(",") and options.weights is None:
        parser.error("the phase quality trains a model: give its folder with --weights")
    if options.weights is not None and not (options.weights / "config.json").is_file():
        parser.error(f"--weights {options.weights} is no folder with a config.json")
    if not (options.reference or options.phase):
        sys.exit(run(options))
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.phase:
        serve(options)
        return
    from benchmarks.gpu.correctness import write_reference

    torch.set_num_threads(1)
    write_reference(options.reference)


if __name__ == "__main__":
    main()
