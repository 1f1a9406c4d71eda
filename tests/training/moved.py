"""Trainings whose trained weights are somewhere else than the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.training.asked import annealing_of, on_policy_of, process_of, weights_of
from dllm_convert.training.run import _arguments
from dllm_convert.training.setup import teaching_copy, trainable_model
from dllm_convert.training.trainer import DiffusionTrainer


def moved_model(plan: ConversionPlan, folder: Path) -> Any:
    """The model of a conversion as it is trained, all that is trained of it moved."""
    torch.manual_seed(0)
    model, draws = trainable_model(plan, folder), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=draws))
    return model


def trainer_of(plan: ConversionPlan, folder: Path, model: Any = None) -> DiffusionTrainer:
    """A training of a model, by default the moved one, that was not begun."""
    trainer = DiffusionTrainer(
        moved_model(plan, folder) if model is None else model,
        _arguments(plan.recipe, folder / ".work/trainer", False, False),
        base=teaching_copy(plan, folder),
        process=process_of(plan.recipe.noise),
        weights=weights_of(plan.recipe.training),
        annealing=annealing_of(plan.recipe),
        on_policy=on_policy_of(plan.recipe),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer
