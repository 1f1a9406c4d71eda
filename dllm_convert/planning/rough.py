"""How long a recipe takes, before any checkpoint is looked at: from the size of its base alone."""

from __future__ import annotations

from dllm_convert.planning.costs import flops_per_token
from dllm_convert.planning.devices import GPUS
from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.recipe.schema import Recipe


def rough_hours(recipe: Recipe) -> float | None:
    """Estimate the hours of a recipe on one of the device it names.

    Every weight counts as a matrix that each token passes through. A vocabulary passes at scored
    tokens only, and attention comes on top: of models from 135M to 8B parameters this is within a
    third of what `estimate` says from headers, which assumes what a GPU reaches (`devices.py`).

    Args:
        recipe: The resolved recipe.

    Returns:
        Hours, to two digits; None if it names no size or no device, or trains nothing.
    """
    device = next((gpu for gpu in GPUS if gpu.name == recipe.device), None)
    if device is None or recipe.parameters is None or recipe.training.method == "none":
        return None
    size = recipe.parameters
    shape = ModelShape(
        embedding=0,
        head=0,
        layer_parameters=size,
        other=0,
        tied=True,
        vocabulary=0,
        hidden=0,
        layers=1,
        queries=0,
        heads=0,
        matrices=float(size),
        outputs=0.0,
        stored_matrices=size,
        adapted=0,
        adapted_matrices=0,
        adapted_outputs=0.0,
        norms=0,
    )
    seconds = recipe.training_tokens * flops_per_token(shape, recipe, sparse=True) / device.flops
    if recipe.training.max_minutes is not None:
        seconds = min(seconds, recipe.training.max_minutes * 60)
    return float(f"{seconds / 3600:.2g}")
