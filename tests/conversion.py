"""Convert a tiny checkpoint with the real stages, for tests of what comes after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_convert.console import Reporter
from dllm_convert.plan import ConversionPlan, make_plan
from dllm_convert.schema import Recipe
from dllm_convert.source import inspect_source


def convert(
    base: Path, folder: Path, target: str, *, block: int = 8, method: str = "none", **fields: Any
) -> ConversionPlan:
    """Write an untrained conversion of `base` into `folder` and return its plan.

    Args:
        base: Tiny checkpoint.
        folder: New folder.
        target: mdlm or bd3lm.
        block: Tokens per block, bd3lm only.
        method: What the recipe says of training; nothing is trained here.
        **fields: Other fields of the recipe.
    """
    from dllm_convert.weights import adapt

    recipe = {
        "source": str(base),
        "target": target,
        "block_size": block if target == "bd3lm" else None,
        "data": {"sequence_length": block * 8},
        "training": {"method": method},
    }
    plan = make_plan(Recipe.model_validate({**recipe, **fields}), inspect_source(str(base)))
    adapt(plan, base, folder, Reporter(quiet=True))
    return plan
