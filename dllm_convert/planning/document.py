"""A plan as `check` shows it: what it is, where it is written, what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.planning.host_memory import Strategy, host_memory
from dllm_convert.recipe.typed import default_out

if TYPE_CHECKING:
    from dllm_convert.planning.conversion import ConversionPlan


STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2")
"""Those whose host memory a plan compares."""


def plan_document(
    plan: ConversionPlan, out: Path | None = None, processes: int = 1, **measured: Any
) -> dict[str, Any]:
    """Return what `check --json` prints of a plan.

    Args:
        plan: The plan.
        out: Where it would be written; None for where the command would.
        processes: How many train.
        **measured: What else is known of the source.
    """
    from dllm_convert.planning.conversion import plan_as_dict
    from dllm_convert.planning.devices import this_cpu
    from dllm_convert.planning.estimate import estimate
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
    if recipe.training.method != "none" and processes > 1:
        sequences = recipe.training.sequences_per_step * processes
        document["launch"] = {"processes": processes, "sequences_per_step": sequences}
        if plan.shape is not None:
            document["launch"]["host_memory"] = {
                strategy: host_memory(
                    plan.shape, recipe, processes=processes, per_machine=processes,
                    strategy=strategy,
                ).as_dict()
                for strategy in STRATEGIES
            }  # fmt: skip
    return document
