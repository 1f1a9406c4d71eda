"""The recipe that a converted checkpoint was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest
from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Recipe


def recorded_recipe(folder: Path) -> Recipe:
    """Return the recipe that a converted checkpoint was made with, from its manifest.

    Raises:
        DataError: There is no manifest, or no recipe of this version in it.
    """
    from pydantic import ValidationError

    from dllm_convert.recipe.fields import describe_problem
    from dllm_convert.recipe.schema import Recipe

    path = folder / MANIFEST_FILE
    recipe = read_manifest(folder).get("recipe")
    if recipe is None:
        raise DataError(f"{path} has no recipe, which every run records", hint="Convert it again")
    try:
        return Recipe.model_validate(_renamed(recipe))
    except ValidationError as error:
        problem = describe_problem(error.errors(include_url=False)[0])
        raise DataError(
            f"{path}: the recipe is not one of this version: {problem}",
            hint="Convert the model again with this version of dllm-convert",
        ) from error


def _renamed(recipe: Any) -> Any:
    """Return a recipe with what earlier manifests call otherwise under its name of today."""
    training = recipe.get("training") if isinstance(recipe, dict) else None
    lora = training.get("lora") if isinstance(training, dict) else None
    if not isinstance(training, dict) or not isinstance(lora, dict) or "draft" not in lora:
        return recipe
    kept = {name: value for name, value in lora.items() if name != "draft"}
    return {**recipe, "block_attention": lora["draft"], "training": {**training, "lora": kept}}
