"""What a recipe asks of a training, as the values of the mathematics and of the Trainer."""

from __future__ import annotations

from dllm_convert.diffusion.corruption import ForwardProcess
from dllm_convert.diffusion.distillation import Distillation
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.recipe.schema import Noise, Recipe, Training
from dllm_convert.training.growth import BlockGrowth
from dllm_convert.training.on_policy import OnPolicy
from dllm_convert.training.parts import Annealing, LossWeights


def schedule_of(noise: Noise) -> Schedule:
    """Return the noise schedule a recipe asks for."""
    return Schedule(
        # What is learnt begins as that.
        "linear" if noise.schedule == "learned" else noise.schedule,
        noise.power,
        min_time=noise.min_time,
        max_time=noise.max_time,
        discrete_steps=noise.discrete_steps,
    )


def process_of(noise: Noise) -> ForwardProcess:
    """Return the forward process a recipe asks for."""
    return ForwardProcess(
        schedule_of(noise),
        noise.draw,
        position_bias=noise.position_bias,
        views=noise.views,
        complementary=noise.complementary,
        paired=noise.schedule == "learned",
    )


def weights_of(training: Training) -> LossWeights:
    """Return what a recipe has the loss made of."""
    return LossWeights(
        training.loss_weight,
        training.ar_loss_weight,
        distillation_of(training),
        training.confidence_loss_weight,
        training.alignment_loss_weight,
        training.auxiliary_loss_weight,
    )


def distillation_of(training: Training) -> Distillation | None:
    """Return what a recipe has be learnt from the base."""
    chosen = training.distillation
    if not training.learns_from_base:
        return None
    return Distillation(chosen.weight, chosen.divergence, chosen.temperature, chosen.top_k)


def on_policy_of(recipe: Recipe) -> OnPolicy | None:
    """Return when a recipe has the model write what it is trained on; None for never."""
    chosen = recipe.training.on_policy
    if not chosen.share:
        return None
    views = recipe.noise.views
    return OnPolicy(
        chosen.share, chosen.prompt_tokens, chosen.new_tokens, chosen.temperature, views
    )


def annealing_of(recipe: Recipe) -> Annealing:
    """Return what a recipe has fade, or grow, over the first steps."""
    training, sizes = recipe.training, recipe.growing_sizes
    growth = BlockGrowth(sizes, training.block_growth.steps) if sizes else None
    return Annealing(
        attention_steps=training.attention_annealing_steps,
        mask_noise_std=training.mask_noise_std,
        mask_noise_steps=training.mask_noise_steps,
        blocks=growth,
        planned=training.steps,
    )
