"""Tokens per second and memory of one training step, against the textbook's.

    python -m benchmarks.step CONVERTED --batch 4 --length 128

CONVERTED is a folder that `dllm-convert run SOURCE --no-train` wrote. Both steps train all weights
of the same model on the same batches with the same optimizer, in turn: the other way round every
second time, each in a process of its own. The ratio of each pair is taken, and of those the median,
least and largest. Memory is the peak above weights, gradients and moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import (
    add_device,
    chosen_device,
    current_device,
    held_bytes,
    peak_bytes,
    seconds,
)
from benchmarks.steps import Columns, Step, ours, textbooks
from dllm_convert.cli.values import parse_assignments
from dllm_convert.common.allocator import keep_freed_memory
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.diffusion.objective import Objective
from dllm_convert.modeling.loading import load_model
from dllm_convert.pipeline.run import plan_conversion
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.data.rows import collate
from dllm_convert.training.setup import make_trainable, settled_plan, trainable_model


def rows(tokens: torch.Tensor) -> Columns:
    """Columns of a batch of whole documents, as the package's data gives them."""
    places = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    return collate(
        [
            {
                "input_ids": line,
                "segment_ids": torch.zeros_like(line),
                "position_ids": at,
                "loss_mask": torch.ones_like(line, dtype=torch.bool),
            }
            for line, at in zip(tokens, places, strict=True)
        ]
    )


KINDS = {"textbook": textbooks, "ours": ours}


def planned(recipe: Recipe) -> ConversionPlan:
    """Plan a training, with what the recipe leaves to the device chosen for the one there is."""
    return settled_plan(plan_conversion(recipe))


def load(folder: Path, plan: ConversionPlan, *, is_ours: bool) -> Any:
    """Load the model as the package trains it, or as the textbook does, where it is to run."""
    if is_ours:
        model = trainable_model(plan, folder)
    else:
        model = make_trainable(load_model(folder, plan.adapter), plan.adapter, plan.recipe.training)
    return model.to(current_device())


def prepare(options: argparse.Namespace, kind: str) -> tuple[Any, Step]:
    """Load the model and return it with the step of a kind."""
    config = json.loads((options.converted / "config.json").read_text())
    target = config["diffusion"]["objective"]
    recipe = load_recipe(
        str(options.converted),
        overrides={
            "target": target,
            "block_size": config["diffusion"]["block_size"],
            "training.method": options.method,
            "training.batch_size": options.batch,
            "training.learning_rate": 1e-5,
            "noise.complementary": False,  # the textbook draws one mask as well
            **parse_assignments(options.set),
        },
    )
    plan = planned(recipe)
    model = load(options.converted, plan, is_ours=kind == "ours")
    objective = Objective.from_config(model.config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    return model, KINDS[kind](model, plan.recipe, objective, optimizer)


def batch(options: argparse.Namespace, number: int, size: int | None = None) -> Columns:
    """Random tokens: the time of a step does not depend on what they are."""
    config = json.loads((options.converted / "config.json").read_text())
    generator = torch.Generator().manual_seed(number)
    shape = (size or options.batch, options.length)
    above = min(40_000, config["vocab_size"])
    return rows(torch.randint(100, above, shape, generator=generator))


def serve(options: argparse.Namespace) -> None:
    """Run the steps of one kind as they are asked for, a line each, and answer with what it took.

    "step N" answers with wall and processor seconds, "memory" with the peak so far above weights,
    gradients and moments, in bytes.
    """
    if options.serve == "ours":
        keep_freed_memory()
    model, step = prepare(options, options.serve)
    # Moments are made in the first step; a short one leaves the least behind.
    step(batch(options, 0, 1))
    weights = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    at_rest = held_bytes() + 4 * weights  # gradients are gone by now
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("memory"):
            print(peak_bytes() - at_rest, flush=True)
            continue
        columns = batch(options, int(line.split()[1]))
        used = time.process_time()
        wall, _ = seconds(partial(step, columns))
        print(wall, time.process_time() - used, flush=True)


class Worker:
    """A process that runs the steps of one kind."""

    def __init__(self, kind: str) -> None:
        line = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--serve", kind]
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}")
        return line

    def ask(self, question: str) -> list[float]:
        """Send a line and return the numbers of the answer."""
        if self._process.stdin:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        return [float(part) for part in self._answer().split()]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Time both kinds in turn, each in a process of its own."""
    workers = {kind: Worker(kind) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.repeats + 1):
        for kind in list(KINDS) if number % 2 else list(reversed(KINDS)):
            wall, used = workers[kind].ask(f"step {number}")
            times[kind].append(wall)
            processor[kind].append(used)
    above = {kind: int(worker.ask("memory")[0]) for kind, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {
        "ratio": spread(times),
        "processor_ratio": spread(processor),
        "tokens_per_second": {
            kind: round(options.batch * options.length / statistics.median(values[1:]))
            for kind, values in times.items()
        },
        "pairs": options.repeats,
        "memory_above": above,
        "memory_ratio": round(above["ours"] / above["textbook"], 3),
    }


def spread(times: dict[str, list[float]]) -> list[float]:
    """Median, least and largest of the textbook's time over ours; the first pair warms up."""
    pairs = zip(times["textbook"][1:], times["ours"][1:], strict=True)
    ratios = sorted(theirs / mine for theirs, mine in pairs)
    return [round(value, 3) for value in (statistics.median(ratios), ratios[0], ratios[-1])]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    add_device(parser)
    parser.add_argument("--serve", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen_device(options)
    with quiet_libraries():
        if options.serve:
            serve(options)
        else:
            print(json.dumps(compare(options), indent=2))


if __name__ == "__main__":
    main()
