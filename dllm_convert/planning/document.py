"""A plan as `check` shows it: what it is, where it is written, what it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.planning.host_memory import host_memory
from dllm_convert.planning.launch import ALONE, Launch
from dllm_convert.recipe.typed import default_out

if TYPE_CHECKING:
    from dllm_convert.planning.conversion import ConversionPlan
    from dllm_convert.recipe.schema import Recipe


STRATEGIES = ("ddp", "fsdp2")
"""Those whose host memory a plan compares with that of its launch."""


def plan_document(plan: ConversionPlan, out: Path | None = None, **measured: Any) -> dict[str, Any]:
    """Return what `check --json` prints of a plan.

    Args:
        plan: The plan.
        out: Where it would be written; None for where the command would.
        **measured: What else is known of the source.
    """
    from dllm_convert.planning.conversion import plan_as_dict
    from dllm_convert.planning.devices import GPUS, this_cpu
    from dllm_convert.planning.estimate import estimate, uses_bf16
    from dllm_convert.planning.servable import servable, served

    recipe = plan.recipe
    document = {
        "out": str(out or default_out(recipe)),
        **plan_as_dict(plan),
        "estimate": estimate(plan, this_cpu()),
        "serving": servable(plan),
        "serve": served(plan),
        **measured,
    }
    launch, shape = plan.launch, plan.shape
    if recipe.training.method != "none" and launch != ALONE:
        document["launch"] = launch_document(recipe, launch)
        if shape is not None and launch.processes > 1:
            document["launch"]["host_memory"] = {
                strategy: host_memory(
                    shape, recipe, processes=launch.processes, per_machine=launch.per_machine,
                    strategy=strategy,
                    offload=launch.offload if strategy == launch.strategy else (),
                    bf16=uses_bf16(recipe, GPUS[0]),
                ).as_dict()
                for strategy in dict.fromkeys((launch.strategy, *STRATEGIES))
            }  # fmt: skip
    return document


def launch_document(recipe: Recipe, launch: Launch) -> dict[str, Any]:
    """Return what a launch makes of a recipe: sequences and steps, and of its learning rate.

    Args:
        recipe: Resolved for this launch.
        launch: Who trains together.
    """
    training = recipe.training
    sequences = training.sequences_per_step * launch.processes
    # What was asked for over all of them was chosen together with the rate.
    times = 1 if launch.global_batch is not None else launch.processes
    return {
        **launch.as_dict(),
        "sequences_per_step": sequences,
        "sequences_of_one": sequences // times,
        "steps": training.steps,
        "budget": "tokens" if training.tokens is not None else "steps",
        "learning_rate": training.peak_learning_rate,
        "learning_rate_by_square_root": float(
            f"{training.peak_learning_rate * math.sqrt(times):.2g}"
        ),
    }
