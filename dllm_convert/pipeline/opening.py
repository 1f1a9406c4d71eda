"""What a run says before it begins: what it makes of what, and how long that takes."""

from __future__ import annotations

from pathlib import Path

from dllm_convert.common.quantities import hours_text
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.devices import Device
from dllm_convert.planning.document import launch_document
from dllm_convert.planning.estimate import estimate_device
from dllm_convert.planning.launch import ALONE
from dllm_convert.planning.launch_text import launch_line


def opening_lines(plan: ConversionPlan, out: Path) -> list[str]:
    """Say what a run makes of what, where, and who trains together."""
    recipe, source = plan.recipe, plan.source
    size = f", {source.parameters:,} parameters" if source.parameters else ""
    blocks = f" in blocks of {recipe.block_size}" if recipe.block_size else ""
    lines = [
        f"{source.given}: {plan.adapter.model_type}{size}",
        f"becomes {recipe.target}{blocks} in {out}; the same command goes on after a stop",
    ]
    if recipe.training.method != "none" and plan.launch != ALONE:
        lines.append(launch_line(launch_document(recipe, plan.launch)))
    return lines


def training_line(plan: ConversionPlan, device: Device | None) -> str:
    """Say what a training does, and how long that takes on a device that something is known of."""
    recipe, training = plan.recipe, plan.recipe.training
    what = "LoRA" if training.method == "lora" else "all weights"
    said = f"trains {what} on {recipe.data.source}: {training.steps:,} steps"
    if training.max_minutes is not None:
        said += f" or {hours_text(training.max_minutes / 60)}, whichever comes first"
    if plan.shape is None or device is None:
        return said
    causal = plan.adapter.attention == "causal"
    known = estimate_device(plan.shape, recipe, device, causal=causal, launch=plan.launch)
    hours = known.hours
    if training.max_minutes is not None and hours * 60 >= training.max_minutes:
        return said
    expected = "less than a minute" if hours < 1 / 60 else f"about {hours_text(hours)}"
    return f"{said}, {expected} on {device.name}"
