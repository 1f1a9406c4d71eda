"""DiffusionTrainer: transformers' Trainer with a diffusion loss."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import Trainer

from dllm_convert.diffusion.corruption import Corruption, corrupt_by_count, corrupt_by_time
from dllm_convert.diffusion.objective import Objective, TextBatch, cross_entropy, predict
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.schema import Recipe
from dllm_convert.training.data import text_batch


def noise_generator(seed: int, step: int, micro_step: int, rank: int) -> torch.Generator:
    """Noise that depends on where training is and on nothing else, so a resumed run repeats it."""
    key = f"{seed}/{step}/{micro_step}/{rank}".encode()
    digest = hashlib.blake2b(key, digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class DiffusionTrainer(Trainer):
    """Trains what `objective` says, on the text the dataset holds.

    The optimised loss is the NELBO, or with `loss_weight: uniform` the mean cross-entropy at masked
    positions; the NELBO in nats per token is logged beside it either way.
    """

    # A mean over this batch: the Trainer divides by the accumulation steps itself.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, recipe: Recipe, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._recipe = recipe
        self._objective = objective
        self._schedule = Schedule.from_recipe(recipe.noise)
        self._noise_at = (-1, -1)
        self._nelbo_sum = torch.zeros((), dtype=torch.float64)
        self._scored = 0
        self.unsound = torch.zeros((), dtype=torch.bool, device=self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward; remember in `unsound` a loss that was not a number."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.unsound = self.unsound | ~loss.isfinite()
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Corrupt, predict, compare; a scalar in nats."""
        batch = text_batch(inputs)
        forward = predict(batch, self._corrupt(batch), self._objective)
        output = model(**forward.inputs, use_cache=False)
        nats = cross_entropy(output.logits, forward.targets, self._objective.mask_token_id)
        total = (nats * forward.weight).sum()
        self._nelbo_sum += total.detach().double().cpu()
        self._scored += forward.scored
        if self._recipe.training.loss_weight == "uniform":
            loss = nats.sum() / max(len(nats), 1)
        else:
            loss = total / max(forward.scored, 1)
        return (loss, output) if return_outputs else loss

    def _corrupt(self, batch: TextBatch) -> Corruption:
        step = self.state.global_step
        micro = self._noise_at[1] + 1 if self._noise_at[0] == step else 0
        self._noise_at = (step, micro)
        generator = noise_generator(
            self._recipe.training.seed, step, micro, self.args.process_index
        )
        groups = batch.noise_groups(self._objective)
        if self._recipe.noise.draw == "count":
            return corrupt_by_count(groups, batch.scorable, generator)
        return corrupt_by_time(groups, batch.scorable, self._schedule, generator)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the NELBO since the last line, in nats per token."""
        if self._scored and "loss" in logs:
            logs = {**logs, "nelbo": float(self._nelbo_sum) / self._scored}
            self._nelbo_sum.zero_()
            self._scored = 0
        super().log(logs, *args, **kwargs)
