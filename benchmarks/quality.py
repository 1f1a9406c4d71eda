"""Held-out NELBO against training time: the small-budget preset against the textbook's step.

    python -m benchmarks.quality CONVERTED --data 'texts/*.txt' --out results.json

CONVERTED is a folder that `dllm-convert run SOURCE --to bd3lm --block 32 --no-train` wrote. The
textbook trains with the defaults of dLLM's examples: rate 1e-4, cosine after 10 % warm-up, no token
shift, one noise level per sequence; once in full, once as LoRA of rank 32 on all linear layers with
nothing else trainable. Every run starts from the same weights and sees the same text; time is wall
time of training alone, and all are measured on the same held-out tokens with the same noise. How
many steps fit is found with six steps that are thrown away, for both sides alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, get_scheduler

from benchmarks.devices import add_device, chosen_device, current_device, seconds
from benchmarks.step import load, planned
from benchmarks.steps import Step, ours, textbooks
from dllm_convert.cli.values import parse_assignments
from dllm_convert.common.allocator import keep_freed_memory
from dllm_convert.common.console import Reporter
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.diffusion.likelihood import autoregressive_nll, nelbo
from dllm_convert.diffusion.objective import Objective
from dllm_convert.modeling.loading import load_model
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.training.data.rows import collate
from dllm_convert.training.data.text import TextData, prepare_data


class Contestant:
    """A model, how it is trained and what it is measured on."""

    def __init__(self, options: argparse.Namespace, kind: str) -> None:
        folder = str(options.converted)
        fields: dict[str, Any] = {
            "data.source": options.data,
            "data.held_out_sequences": 48,
            "block_size": 32,
            "training.seed": options.seed,
        }
        if kind == "textbook-full":
            fields |= {"training.method": "full"}
        if kind == "textbook-lora":
            fields |= {
                "training.method": "lora",
                "training.lora.rank": 32,
                "training.lora.alpha": 32,
                "training.lora.embeddings": "mask_row",
                "training.lora.norms": False,
                "training.lora.learning_rate": 1e-4,
            }
        if kind == "ours":
            fields |= parse_assignments(options.set)
        else:
            fields |= {"training.learning_rate": 1e-4, "training.lr_schedule": "cosine"}
            fields["training.batch_size"] = options.rows
        self.kind = kind
        fields |= parse_assignments(options.common)
        plan = planned(load_recipe(folder, overrides=fields))
        self.recipe, self.adapter = plan.recipe, plan.adapter
        torch.manual_seed(0)
        self.model = load(options.converted, plan, is_ours=kind == "ours")
        self.objective = Objective.from_config(self.model.config)
        if kind != "ours":
            self.objective = replace(self.objective, token_shift=False)
        if kind == "textbook-lora":
            for name, weight in self.model.named_parameters():
                weight.requires_grad_("lora_" in name)

    def steps(self, planned: int) -> Step:
        """Return the step, with an optimizer and a rate that follows `planned` steps."""
        training = self.recipe.training
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        betas = (0.9, training.adam_beta2 if self.kind == "ours" else 0.999)
        optimizer = torch.optim.AdamW(
            weights, lr=training.peak_learning_rate, betas=betas, weight_decay=0.0, fused=True
        )
        schedule = get_scheduler(training.lr_schedule, optimizer, max(planned // 10, 1), planned)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        made = ours if self.kind == "ours" else textbooks
        return made(self.model, self.recipe, self.objective, optimizer)


def batches(data: TextData, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of training rows."""
    rows: Any = data.training_rows(start=0, total=10**6)
    for start in range(0, 10**6, size):
        yield collate([rows[number] for number in range(start, start + size)])


def run(options: argparse.Namespace, kind: str, budgets: list[float]) -> list[dict[str, Any]]:
    """Train for the longest budget, measure at each; the clock stands while measuring."""
    if kind == "ours":
        keep_freed_memory()
    trial = Contestant(options, kind)
    tokenizer = AutoTokenizer.from_pretrained(options.converted)
    data = prepare_data(trial.recipe, tokenizer, Reporter(quiet=True))
    size = trial.recipe.training.sequences_per_forward
    step, text = trial.steps(10), batches(data, size)
    taken = [seconds(lambda: step(next(text)))[0] for _ in range(6)]
    planned = int(budgets[-1] / statistics.median(taken[1:]))
    del trial, step
    contestant = Contestant(options, kind)
    step, text = contestant.steps(planned), batches(data, size)
    used, done, found = 0.0, 0, []
    for budget in budgets:
        while used < budget:
            used += seconds(lambda: step(next(text)))[0]
            done += 1
        contestant.model.eval()
        measured = nelbo(contestant.model, data.held_out, contestant.objective, seed=0)
        found.append(
            {
                "kind": kind,
                "budget_s": budget,
                "steps": done,
                "planned": planned,
                **measured.as_dict(),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    if kind == "ours" and options.base:
        base = load_model(options.converted, contestant.adapter).to(current_device())
        rows = base.get_input_embeddings().num_embeddings
        for name, value in (
            ("untrained", nelbo(base, data.held_out, contestant.objective, seed=0)),
            ("ar", autoregressive_nll(base, data.held_out, rows)),
        ):
            print(json.dumps({"kind": name, **value.as_dict()}), flush=True)
    return found


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--common", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kinds", default="ours,textbook-full,textbook-lora")
    parser.add_argument("--budgets", default="120,300", help="seconds")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step of the textbook")
    parser.add_argument("--seed", type=int, default=0, help="order of the text, noise of ours")
    parser.add_argument("--base", action="store_true", help="also measure the untrained model")
    parser.add_argument("--out", type=Path)
    add_device(parser)
    options = parser.parse_args()
    chosen_device(options)
    budgets = [float(part) for part in options.budgets.split(",")]
    results: list[dict[str, Any]] = []
    with quiet_libraries():
        for kind in options.kinds.split(","):
            # A schedule that ends with the budget is part of the preset: a run for each.
            for these in [[budget] for budget in budgets] if kind == "ours" else [budgets]:
                results += run(options, kind, these)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
