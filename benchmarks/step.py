"""Tokens per second and memory of one training step, against the textbook's.

    python -m benchmarks.step CONVERTED --batch 4 --length 128

CONVERTED is a folder that `dllm-convert run SOURCE --no-train` wrote. Both steps train all weights
of the same model on the same batches with the same optimizer, in turn: the other way round every
second time, each in a process of its own. The ratio of each pair is taken, and of those the median,
least and largest. Memory is the peak above weights, gradients and moments.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import textbook
from dllm_convert.adapters import Adapter, adapter_of
from dllm_convert.cli.values import parse_assignments
from dllm_convert.common.allocator import keep_freed_memory
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.diffusion.objective import Objective
from dllm_convert.modeling.loading import load_model
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.asked import annealing_of, process_of, weights_of
from dllm_convert.training.checkpointing import checkpoint_activations
from dllm_convert.training.data.rows import collate
from dllm_convert.training.run import _arguments
from dllm_convert.training.setup import attention_implementation, make_trainable, use_bf16
from dllm_convert.training.trainer import DiffusionTrainer

Columns = dict[str, torch.Tensor]
Step = Callable[[Columns], float]


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


def ours(model: Any, recipe: Any, objective: Objective, optimizer: Any) -> Step:
    """The package's step, through its own Trainer."""
    arguments = _arguments(recipe, Path("unused/.work/trainer"), use_bf16(recipe.training), False)
    trainer = DiffusionTrainer(
        model,
        arguments,
        objective=objective,
        process=process_of(recipe.noise),
        weights=weights_of(recipe.training),
        annealing=annealing_of(recipe.training),
    )
    trainer.current_gradient_accumulation_steps = 1
    # Mixed precision is wrapped around the model when a training begins.
    prepared = trainer.accelerator.prepare_model(model)

    def step(columns: Columns) -> float:
        batches, _ = trainer.get_batch_samples(iter([columns]), 1, torch.device("cpu"))
        loss = trainer.training_step(prepared, batches[0])
        _update(model, optimizer)
        trainer.state.global_step += 1
        return float(loss)

    return step


def textbooks(model: Any, recipe: Any, objective: Objective, optimizer: Any) -> Step:
    """The textbook's step."""
    generator = torch.Generator().manual_seed(0)
    bf16 = use_bf16(recipe.training)

    def step(columns: Columns) -> float:
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = textbook.loss(
                model,
                columns["input_ids"],
                objective.mask_token_id,
                objective.block_size,
                generator,
            )
        loss.backward()
        _update(model, optimizer)
        return float(loss.detach())

    return step


def _update(model: Any, optimizer: Any) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


KINDS = {"textbook": textbooks, "ours": ours}


def load(folder: Path, recipe: Recipe, adapter: Adapter, *, is_ours: bool) -> Any:
    """Load the model as the package trains it, or as the textbook does."""
    if not is_ours:
        return load_model(folder, adapter)
    model = load_model(folder, adapter, attention=attention_implementation(recipe, adapter))
    checkpoint_activations(model, recipe.training.gradient_checkpointing)
    return model


def prepare(options: argparse.Namespace, kind: str) -> tuple[Any, Step]:
    """Load the model and return it with the step of a kind."""
    config = json.loads((options.converted / "config.json").read_text())
    adapter = adapter_of(config)
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
    model = load(options.converted, recipe, adapter, is_ours=kind == "ours")
    objective = Objective.from_config(model.config)
    model = make_trainable(model, adapter, recipe.training)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    return model, KINDS[kind](model, recipe, objective, optimizer)


def batch(options: argparse.Namespace, number: int, size: int | None = None) -> Columns:
    """Random tokens: the time of a step does not depend on what they are."""
    generator = torch.Generator().manual_seed(number)
    shape = (size or options.batch, options.length)
    return rows(torch.randint(100, 40_000, shape, generator=generator))


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


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
    # Ours keeps freed memory, that of this step's gradients too: it is not to count twice.
    ctypes.CDLL(None).malloc_trim(0)
    at_rest = _status("VmRSS") + 4 * weights  # gradients are gone by now
    Path("/proc/self/clear_refs").write_text("5")
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("memory"):
            print(_status("VmHWM") - at_rest, flush=True)
            continue
        columns = batch(options, int(line.split()[1]))
        started, used = time.perf_counter(), time.process_time()
        step(columns)
        print(time.perf_counter() - started, time.process_time() - used, flush=True)


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
    parser.add_argument("--serve", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with quiet_libraries():
        if options.serve:
            serve(options)
        else:
            print(json.dumps(compare(options), indent=2))


if __name__ == "__main__":
    main()
