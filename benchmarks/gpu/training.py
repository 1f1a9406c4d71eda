"""How fast training is: against the model's own autoregressive one, the textbook, and the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.devices import current_device, median_seconds, peak_bytes, seconds, settle
from benchmarks.gpu.checks import Check, Options
from benchmarks.gpu.correctness import sparse_attention
from benchmarks.gpu.models import (
    ADAPTER,
    SIZES,
    build,
    columns,
    peak_flops,
    planned_bytes,
    recipe_of,
    shape_of,
    this_device,
)
from benchmarks.gpu.table import Results
from benchmarks.host import GOAL_MS, layout, micro_steps
from benchmarks.steps import Columns, Step, ours, textbooks, trained_weights, update
from dllm_convert.diffusion.objective import Objective
from dllm_convert.planning.costs import flops_per_token
from dllm_convert.planning.devices import USABLE_MEMORY
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.checkpointing import checkpoint_activations
from dllm_convert.training.setup import compile_layers, make_trainable, training_dtype

GROUP = "training"
_MFU_GOAL = 0.45
Kind = Literal["ours", "autoregressive", "textbook"]


@dataclass(frozen=True)
class Run:
    """A training that is timed.

    Attributes:
        name: How the table calls it.
        size: A key of `SIZES`.
        kind: Whose step.
        rows: Rows of a forward.
        fields: Fields of the recipe's section `training`.
        goal: Tokens of text per second on an H200; None for none.
        limit: What its data sheet allows, by the operations of `costs.py`.
        is_main: Whether its share of the peak has a goal, and where its time goes is looked at.
    """

    name: str
    size: str
    kind: Kind
    rows: int
    fields: dict[str, Any] = field(default_factory=dict)
    goal: float | None = None
    limit: float | None = None
    is_main: bool = False


RUNS = (
    Run("full", "1.5B", "ours", 4, goal=26_400, limit=46_900, is_main=True),
    Run("autoregressive", "1.5B", "autoregressive", 4),
    Run("textbook", "1.5B", "textbook", 4),
    Run("LoRA", "1.5B", "ours", 4, {"method": "lora"}, goal=30_000, limit=66_600),
    Run("full", "135M", "ours", 32, goal=250_000, limit=506_000),
    Run("autoregressive", "135M", "autoregressive", 32),
    Run("textbook", "135M", "textbook", 32),
    Run("full, layers compiled", "1.5B", "ours", 4, {"compile": True}),
)
AGAINST = (("autoregressive", 0.5), ("textbook", 1.5))
"""What ours is to reach, as a ratio of tokens per second."""


def checks(options: Options, results: Results) -> Iterator[Check]:
    """Yield the runs, the ones with goals first."""
    length = 32 if options.tiny else 1024
    rates: dict[tuple[str, str], float] = {}
    repeats = 2 if options.tiny else 10
    for run in RUNS:
        if run.fields.get("compile"):
            # Compiling takes longer than all others: what stands on them comes first.
            yield Check("against others", partial(ratios, results, rates))
            yield Check("host time", partial(host, results, length, repeats))
            if options.tiny:
                return
        size = "tiny" if options.tiny else run.size
        label = f"{size} {run.name}, {run.rows} x {length}"
        timed = Timed(run, size, length, label, options, results, rates)
        # The plan knows ours only.
        yield Check(label, timed, may_not_fit=run.kind != "ours")


def autoregressive_step(model: Any, optimizer: Any) -> Step:
    """Next-token training of the same model, as transformers computes its loss."""
    device, trained = current_device(), trained_weights(model)

    def step(batch: Columns) -> torch.Tensor:
        tokens = batch["input_ids"].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        torch.autograd.backward(loss)
        update(trained, optimizer)
        return loss.detach()

    return step


def autoregressive_flops(size: str, length: int) -> float:
    """Operations of forward and backward per token, counted as in `costs.py`; half of the pairs."""
    shape = shape_of(size)
    matrices = 6.0 * (shape.matrices + shape.vocabulary_matrix)
    return matrices + 12.0 * shape.layers * shape.queries * length / 2


@dataclass
class Timed:
    """A run, timed: tokens of text per second, their share of the peak, memory and the plan's.

    Attributes:
        run: What.
        size: A key of `SIZES`.
        length: Tokens of a row.
        label: How the table calls it.
        options: What was asked for.
        results: Where lines go.
        rates: Tokens per second by size and name, for the ratios.
    """

    run: Run
    size: str
    length: int
    label: str
    options: Options
    results: Results
    rates: dict[tuple[str, str], float]

    def __call__(self) -> None:
        """Measure."""
        run, rows = self.run, self.run.rows
        fields = {"precision": "bf16", "lora": {"rank": 16}, **run.fields}
        recipe = recipe_of("bd3lm", 16, self.length, rows, self.size, **fields)
        device = this_device()
        planned = planned_bytes(self.size, recipe)
        if device.gpu and planned > device.memory * USABLE_MEMORY:
            reason = f"{planned / 1e9:.0f} GB by the plan, and there are {device.memory / 1e9:.0f}"
            self.results.left_out(GROUP, self.label, reason)
            return
        step = self.step(recipe)
        vocabulary = SIZES[self.size].vocab_size - 1
        batches = [columns(rows, self.length, seed, vocabulary) for seed in range(4)]
        for batch in batches[:3]:
            step(batch)
        settle()
        took = median_seconds(lambda: step(batches[3]), 2 if self.options.tiny else 7)
        rate = rows * self.length / took
        self.rates[self.size, run.name] = rate
        goal = ""
        if run.goal:
            goal = f"> {run.goal:,.0f}, of at most {run.limit:,.0f}"
        ok = None if run.goal is None else rate > run.goal
        self.results.add(GROUP, self.label, rate, "tokens/s", goal=goal, ok=ok)
        self._share_of_peak(recipe, rate, device.name)
        if run.kind == "ours":
            self._memory(planned)
        if run.is_main:
            self._busy(step, batches[3])

    def step(self, recipe: Recipe) -> Step:
        """Build the model and its step."""
        kind, training = self.run.kind, recipe.training
        if kind == "ours":
            attention, dtype = sparse_attention(), training_dtype(training)
            model = build(self.size, attention=attention, dtype=dtype)
            objective = Objective.from_config(model.config)
            checkpoint_activations(model, training.gradient_checkpointing)
            if training.compile:
                compile_layers(model)
            model = make_trainable(model, ADAPTER, training)
        else:
            model = build(self.size, None if kind == "autoregressive" else "bd3lm").train()
        optimizer = torch.optim.AdamW(trained_weights(model), lr=1e-4, fused=True)
        if kind == "autoregressive":
            return autoregressive_step(model, optimizer)
        if kind == "textbook":
            objective = Objective.from_config(model.config)
            return textbooks(model, recipe, objective, optimizer)
        return ours(model, recipe, objective, optimizer)

    def _share_of_peak(self, recipe: Recipe, rate: float, card: str) -> None:
        peak = peak_flops(card)
        if peak is None:
            return
        # What is computed again is no use.
        off = recipe.training.model_copy(update={"gradient_checkpointing": "off"})
        per_token = flops_per_token(
            shape_of(self.size), recipe.model_copy(update={"training": off}), sparse=True
        )
        if self.run.kind == "autoregressive":
            per_token = autoregressive_flops(self.size, self.length)
        share = rate * per_token / peak
        goal, ok = (f"> {_MFU_GOAL}", share > _MFU_GOAL) if self.run.is_main else ("", None)
        what = f"{self.label}: share of {peak / 1e12:.0f} TFLOP/s"
        self.results.add(GROUP, what, share, goal=goal, ok=ok)

    def _memory(self, planned: int) -> None:
        if not torch.cuda.is_available():
            return
        peak = peak_bytes()
        self.results.add(GROUP, f"{self.label}: peak memory", peak / 1e9, "GB")
        share = peak / planned
        what = f"{self.label}: peak memory over the plan's {planned / 1e9:.1f} GB"
        # More than was promised is a training that ends; much less is one that could be faster.
        self.results.add(GROUP, what, share, goal="0.75 to 1.05", ok=0.75 < share < 1.05)

    def _busy(self, step: Step, batch: Columns) -> None:
        cuda = torch.cuda.is_available()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as found:
            wall, _ = seconds(lambda: step(batch))
        kernels = [
            (event.time_range.start, event.time_range.end)
            for event in found.events()
            if event.device_type.name != "CPU" and not event.is_user_annotation
        ]
        busy = covered(kernels) / 1e6 / wall
        what = f"{self.label}: the device is busy, of a profiled step"
        self.results.add(GROUP, what, busy, goal="> 0.9", ok=busy > 0.9)
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=60)
        (self.options.out / "step_profile.txt").write_text(table)


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of what intervals (begin, end) cover together."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def ratios(results: Results, rates: dict[tuple[str, str], float]) -> None:
    """Compare ours with the other two, each at the same size and batch."""
    for (size, name), rate in rates.items():
        for other, goal in AGAINST:
            theirs = rates.get((size, other))
            if name == "full" and theirs:
                ratio, what = rate / theirs, f"{size} full over {other}"
                results.add(GROUP, what, ratio, "x", goal=f"> {goal}", ok=ratio > goal)


def host(results: Results, length: int, repeats: int) -> None:
    """What of a micro-step the host does, and what lays rows out."""
    for method in ("full", "lora"):
        what = f"host: micro-step of 28 layers, {method}"
        median = micro_steps(method, "off", repeats).median
        limit = GOAL_MS.get(f"{method}, off")
        goal, ok = (f"< {limit:g}", median < limit) if limit else ("", None)
        results.add(GROUP, what, median, "ms", goal=goal, ok=ok)
    for name, times in layout(4, length, repeats).items():
        limit, median = GOAL_MS.get(name), times.median
        goal, ok = (f"< {limit:g}", median < limit) if limit else ("", None)
        results.add(GROUP, f"host: {name}, 4 x {length}", median, "ms", goal=goal, ok=ok)
