"""One training step, ours and the textbook's, of any model, on whatever device it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from benchmarks import textbook
from dllm_convert.diffusion.device import device_of
from dllm_convert.diffusion.objective import Objective
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.asked import annealing_of, process_of, weights_of
from dllm_convert.training.setup import use_bf16
from dllm_convert.training.trainer import DiffusionTrainer

Columns = dict[str, torch.Tensor]
Step = Callable[[Columns], torch.Tensor]
"""Trains on a batch that lies on the host, and returns the loss where the model is."""


def micro_step(model: Any, recipe: Recipe, objective: Objective) -> tuple[DiffusionTrainer, Step]:
    """The package's forward and backward, and the Trainer that runs them.

    Args:
        model: What is trained, on the device where it is.
        recipe: Noise, weights and precision.
        objective: What is learnt.
    """
    training = recipe.training
    arguments = TrainingArguments(
        str(Path(tempfile.gettempdir()) / "unused"),
        use_cpu=not torch.accelerator.is_available(),
        bf16=use_bf16(training),
        seed=training.seed,
        remove_unused_columns=False,
        report_to=[],
    )
    # Several GPUs in one process would be DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = DiffusionTrainer(
        model,
        arguments,
        objective=objective,
        process=process_of(recipe.noise),
        weights=weights_of(training),
        annealing=annealing_of(recipe),
    )
    trainer.current_gradient_accumulation_steps = 1
    # Mixed precision is wrapped around the model when a training begins.
    prepared = trainer.accelerator.prepare_model(model)

    def step(columns: Columns) -> torch.Tensor:
        batches, _ = trainer.get_batch_samples(iter([dict(columns)]), 1, arguments.device)
        return trainer.training_step(prepared, batches[0])

    return trainer, step


def ours(model: Any, recipe: Recipe, objective: Objective, optimizer: Any) -> Step:
    """The package's step, through its own Trainer."""
    trainer, forward_and_backward = micro_step(model, recipe, objective)
    trained = trained_weights(model)

    def step(columns: Columns) -> torch.Tensor:
        loss = forward_and_backward(columns)
        update(trained, optimizer)
        trainer.state.global_step += 1
        return loss

    return step


def textbooks(model: Any, recipe: Recipe, objective: Objective, optimizer: Any) -> Step:
    """The textbook's step."""
    device, bf16 = device_of(model), use_bf16(recipe.training)
    generator = torch.Generator(device).manual_seed(0)
    trained = trained_weights(model)

    def step(columns: Columns) -> torch.Tensor:
        model.train()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = textbook.loss(
                model,
                columns["input_ids"].to(device),
                objective.mask_token_id,
                objective.block_size,
                generator,
            )
        torch.autograd.backward(loss)
        update(trained, optimizer)
        return loss.detach()

    return step


def trained_weights(model: Any) -> list[torch.nn.Parameter]:
    """Return the weights that receive gradients."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def update(weights: list[torch.nn.Parameter], optimizer: Any) -> None:
    """Clip the gradients, take a step, and forget them."""
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
