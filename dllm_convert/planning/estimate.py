"""What a planned training takes: trainable parameters, memory, operations, hours, GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.version import Version

from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.costs import (
    FORWARD_TOKENS,
    Memory,
    flops_per_token,
    idle_flops_per_token,
    peak_memory,
    trainable_parameters,
)
from dllm_convert.planning.devices import GPUS, USABLE_MEMORY, Device
from dllm_convert.planning.launch import ALONE, Launch
from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.planning.sharing import Sharing
from dllm_convert.planning.stages import StageMemory, largest_stage, stage_memory
from dllm_convert.recipe.schema import Checkpointing, Recipe

_ALONE = Sharing()
MOST_GPUS = 1024
"""Where the search for a number of GPUs ends."""
FLEX_SINCE = "2.7"
"""First torch whose flex attention trains: 2.6 fails in its backward pass unless it is tuned for
every shape (pytorch/pytorch#146260)."""
ASSUMPTIONS = (
    "rows are filled with whole documents",
    "AdamW over float32 weights",
    "GPU memory was not measured; the CPU's is within 8% of the peaks of SmolLM2-135M",
    "GPUs reach 0.2 of their peak, which small models and short steps do not",
    "as many GPUs as are needed share weights, gradients and moments (FSDP2)",
)
OWN_TEXT = (
    "what the model writes itself takes as many forwards as it can, at the speed of a training; on "
    "a GPU forwards of few tokens are slower, and with a threshold there are fewer"
)
"""Assumed of on-policy steps: how often a threshold commits several is the model's to say."""
SCALING = 0.9
"""Share of their speed that several devices keep while they exchange what they share; assumed, not
measured: how fast machines exchange is theirs to say (`python -m benchmarks.cluster`)."""


@dataclass(frozen=True)
class DeviceEstimate:
    """A training on one kind of device.

    Attributes:
        device: Its name.
        gpu: Whether it is a GPU, of which there can be several.
        room: Bytes of memory of one; None if they are not known.
        memory: Peak bytes of one device while it trains.
        fits: Whether that and every other stage fit; None if its memory is not known.
        devices_needed: Least number that trains it, weights and states shared; None if none does.
        processes: How many of them train.
        tokens_per_second: Of all that train, clean tokens.
        hours: For all steps of the recipe.
        tokens: That they train on: all of the budget, or what `max_minutes` leaves of it.
        source: Where speed and memory of the device are from.
        stage: Which stage of the run takes the most there, alone on one device; it decides what
            fits.
        stage_memory: Peak bytes of that stage.
        checkpointing: What is computed again there: off, selective or full.
        sequences_per_forward: Rows of one forward there.
        fits_with: The setting with which one is enough where it is not; None for none.
    """

    device: str
    gpu: bool
    room: int | None
    memory: int
    fits: bool | None
    devices_needed: int | None
    processes: int
    tokens_per_second: float
    hours: float
    tokens: int
    source: str
    stage: str
    stage_memory: int
    checkpointing: str
    sequences_per_forward: int
    fits_with: str | None


def chosen_attention(recipe: Recipe, *, cuda: bool, cpu: bool) -> str:
    """How a family written by hand computes attention in training, in the recipe's words.

    Args:
        recipe: The resolved recipe.
        cuda: Whether there is a CUDA GPU.
        cpu: Whether there is no accelerator of any kind.
    """
    chosen = recipe.training.attention
    if chosen != "auto":
        return chosen
    if cpu:
        return "tiles"
    return "flex" if cuda and has_flex() else "sdpa"


def has_flex(version: str | None = None) -> bool:
    """Whether the flex attention of this torch, or of a version, trains."""
    found = Version(metadata.version("torch") if version is None else version)
    return found >= Version(FLEX_SINCE)


def uses_flex(recipe: Recipe, *, gpu: bool) -> bool:
    """Whether training computes attention with flex attention."""
    return gpu and chosen_attention(recipe, cuda=gpu, cpu=not gpu) == "flex"


def skips_shut_pairs(recipe: Recipe, *, gpu: bool) -> bool:
    """Whether training's attention computes only pairs that somebody sees: flex, or tiles."""
    return chosen_attention(recipe, cuda=gpu, cpu=not gpu) == ("flex" if gpu else "tiles")


def uses_bf16(recipe: Recipe, device: Device) -> bool:
    """Whether training multiplies in bfloat16 there, as `training/setup.py` chooses."""
    chosen = recipe.training.precision
    return device.bf16 if chosen == "auto" else chosen == "bf16"


def settled(
    shape: ModelShape | None, recipe: Recipe, device: Device, sharing: Sharing = _ALONE
) -> Recipe:
    """Choose what the recipe leaves to the device: what is computed again, rows of a forward.

    On a GPU as many rows as fit without computing anything again: each of a step's forwards has
    the device wait for the host. Where not even one row does, whole layers are computed again,
    which takes a third more time and the least memory.

    Args:
        shape: The model; None if its headers told no shapes, and nothing can be reckoned.
        recipe: The resolved recipe.
        device: Where it trains.
        sharing: What it holds of a training that others take part in.
    """
    training = recipe.training
    rows = training.sequences_per_step
    sizes = [training.sequences_per_forward]
    if training.batch_size == "auto" and device.gpu and shape is not None:
        sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    kinds: Sequence[Checkpointing] = [training.gradient_checkpointing]
    if training.keeps_base and shape is not None and shape.cached:
        # Rows behind a cache are not computed again.
        kinds = ["off"]
    elif kinds == ["auto"]:
        kinds = ["off", "full"] if device.gpu else ["selective"]
    chosen = recipe
    for how in kinds:
        for size in sizes:
            fields = {
                "gradient_checkpointing": how,
                "batch_size": size,
                "gradient_accumulation": rows // size,
            }
            chosen = recipe.model_copy(update={"training": training.model_copy(update=fields)})
            room = device.memory * USABLE_MEMORY
            if shape is not None and _memory(shape, chosen, device, sharing).total <= room:
                return chosen
    return chosen


def _memory(shape: ModelShape, recipe: Recipe, device: Device, sharing: Sharing = _ALONE) -> Memory:
    return peak_memory(
        shape,
        recipe,
        gpu=device.gpu,
        bf16=uses_bf16(recipe, device),
        flex=uses_flex(recipe, gpu=device.gpu),
        sharing=sharing,
    )


def _peak(shape: ModelShape, recipe: Recipe, device: Device, devices: int = 1) -> int:
    """Return the peak of one of so many devices that share everything."""
    sharing = Sharing.all_by(devices)
    return _memory(shape, settled(shape, recipe, device, sharing), device, sharing).total


def devices_needed(shape: ModelShape, recipe: Recipe, device: Device) -> int | None:
    """Return the least number of GPUs that hold a training; None if its activations alone do not.

    Args:
        shape: The model.
        recipe: With the batch of one device.
        device: The kind of GPU.
    """
    room = device.memory * USABLE_MEMORY
    if _peak(shape, recipe, device) <= room:
        return 1
    if _peak(shape, recipe, device, MOST_GPUS) > room:
        return None
    low, high = 1, MOST_GPUS
    while high - low > 1:
        middle = (low + high) // 2
        if _peak(shape, recipe, device, middle) <= room:
            high = middle
        else:
            low = middle
    return high


def stages_on(
    shape: ModelShape, recipe: Recipe, device: Device, *, causal: bool, launch: Launch = ALONE
) -> tuple[StageMemory, ...]:
    """Estimate the peak of every stage of the recipe's run on the device of its first process.

    Args:
        shape: The model.
        recipe: The resolved recipe.
        device: Where it runs.
        causal: Whether the base has an autoregressive likelihood, which is measured too.
        launch: Who trains together.
    """
    sharing = launch.sharing
    return stage_memory(
        shape,
        recipe,
        _memory(shape, settled(shape, recipe, device, sharing), device, sharing),
        gpu=device.gpu,
        bf16=uses_bf16(recipe, device),
        causal=causal,
    )


def estimate_device(
    shape: ModelShape,
    recipe: Recipe,
    device: Device,
    *,
    causal: bool = True,
    launch: Launch = ALONE,
) -> DeviceEstimate:
    """Estimate the recipe's training on one kind of device.

    Args:
        shape: The model.
        recipe: The resolved recipe.
        device: The device.
        causal: Whether the base has an autoregressive likelihood, which is measured too.
        launch: How many of them train together; processes on a CPU share one a machine.
    """
    sharing = launch.sharing
    chosen = settled(shape, recipe, device, sharing)
    flops = flops_per_token(shape, chosen, sparse=skips_shut_pairs(chosen, gpu=device.gpu))
    several = launch.processes if device.gpu else launch.machines
    idle = idle_flops_per_token(shape, chosen)
    rate = device.flops / (flops + idle) * several * (SCALING if several > 1 else 1.0)
    planned = recipe.training_tokens * launch.processes
    minutes = recipe.training.max_minutes
    reached = planned if minutes is None else min(planned, int(rate * minutes * 60))
    memory = _memory(shape, chosen, device, sharing).total
    stages = stages_on(shape, recipe, device, causal=causal, launch=launch)
    largest = largest_stage(stages)
    # Only a training is shared by several devices; whatever is measured runs on one.
    alone = largest_stage(stages, alone=True)
    if device.gpu:
        measured = alone.device <= device.memory * USABLE_MEMORY
        needed = devices_needed(shape, recipe, device)
        fits: bool | None = memory <= device.memory * USABLE_MEMORY and measured
        if not measured:
            largest = alone
    else:
        # The others wait while the first one measures.
        taken = max(largest.device, memory * launch.per_machine)
        fits = taken <= device.memory if device.memory else None
        needed = 1 if fits else None
    return DeviceEstimate(
        device=device.name,
        gpu=device.gpu,
        room=device.memory or None,
        memory=memory,
        fits=fits,
        devices_needed=needed,
        processes=launch.processes,
        tokens_per_second=_rounded(rate),
        hours=_rounded(planned / rate / 3600),
        tokens=reached,
        source=device.source,
        stage=largest.stage,
        stage_memory=largest.device,
        checkpointing=chosen.training.gradient_checkpointing,
        sequences_per_forward=chosen.training.sequences_per_forward,
        fits_with=None if fits or largest is alone else _fits_with(shape, recipe, device, sharing),
    )


def _fits_with(shape: ModelShape, recipe: Recipe, device: Device, sharing: Sharing) -> str | None:
    """Return the first of the ways to smaller moments with which a GPU is enough."""
    if not device.gpu or recipe.training.optimizer != "adamw":
        return None
    for optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        training = recipe.training.model_copy(update={"optimizer": optimizer})
        smaller = recipe.model_copy(update={"training": training})
        there = settled(shape, smaller, device, sharing)
        if _memory(shape, there, device, sharing).total <= device.memory * USABLE_MEMORY:
            return f"training.optimizer={optimizer}"
    return None


def _rounded(value: float) -> float:
    """Three digits, which is more than an estimate knows."""
    return float(f"{value:.3g}")


def _with_method(recipe: Recipe, method: str) -> Recipe:
    training = recipe.training.model_copy(update={"method": method})
    return recipe.model_copy(update={"training": training})


def _memory_by_method(
    shape: ModelShape, recipe: Recipe, devices: Sequence[Device], sharing: Sharing
) -> list[dict[str, Any]]:
    """Break the peak down, for full training and LoRA, on the first CPU and the first GPU."""
    kinds = {device.gpu: device for device in reversed(devices)}
    found = []
    for method in ("full", "lora"):
        chosen = _with_method(recipe, method)
        for gpu in sorted(kinds):
            there = settled(shape, chosen, kinds[gpu], sharing)
            found.append(
                {
                    "method": method,
                    "on": "gpu" if gpu else "cpu",
                    "checkpointing": there.training.gradient_checkpointing,
                    **_memory(shape, there, kinds[gpu], sharing).as_dict(),
                }
            )
    return found


def _memory_by_strategy(shape: ModelShape, recipe: Recipe, launch: Launch) -> list[dict[str, Any]]:
    """Break the peak of a GPU down for every way in which so many processes can share."""
    ways = [
        Launch(launch.processes, launch.machines, strategy, stage)
        for strategy, stage in (("ddp", 0), ("fsdp2", 3), ("zero", 1), ("zero", 2), ("zero", 3))
    ]
    if launch.sharing not in [way.sharing for way in ways]:
        ways.append(launch)
    found = []
    for way in ways:
        there = settled(shape, recipe, GPUS[0], way.sharing)
        found.append(
            {
                "strategy": way.name,
                "asked": way.sharing == launch.sharing,
                "checkpointing": there.training.gradient_checkpointing,
                **_memory(shape, there, GPUS[0], way.sharing).as_dict(),
            }
        )
    return found


def estimate(plan: ConversionPlan, cpu: Device) -> dict[str, Any] | None:
    """Estimate the plan's training; None if there is none, or the headers tell no shapes.

    Args:
        plan: The conversion.
        cpu: This machine's processor.

    Returns:
        Plain values for JSON: memory in bytes, times in hours, tokens counted without the second
        stream of block diffusion.
    """
    shape, recipe, launch = plan.shape, plan.recipe, plan.launch
    if shape is None or recipe.training.method == "none":
        return None
    devices = (cpu, *GPUS)
    causal = plan.adapter.attention == "causal"
    return {
        "method": recipe.training.method,
        "trainable_parameters": trainable_parameters(shape, recipe.training),
        "tokens": plan.training_tokens,
        "flops_per_token": {
            kind: round(
                flops_per_token(
                    shape, settled(shape, recipe, device), sparse=skips_shut_pairs(recipe, gpu=gpu)
                )
            )
            for kind, device, gpu in (("cpu", cpu, False), ("gpu", GPUS[0], True))
        },
        "sequences_per_forward": recipe.training.sequences_per_forward,
        "sequence_length": recipe.data.sequence_length,
        "memory": _memory_by_method(shape, recipe, devices, launch.sharing),
        "strategies": _memory_by_strategy(shape, recipe, launch) if launch.processes > 1 else [],
        "stages": [
            {"on": "gpu" if device.gpu else "cpu", **stage.as_dict()}
            for device in devices[:2]
            for stage in stages_on(shape, recipe, device, causal=causal, launch=launch)
        ],
        "devices": [
            asdict(estimate_device(shape, recipe, device, causal=causal, launch=launch))
            for device in devices
        ],
        "assumptions": [
            *ASSUMPTIONS,
            *(
                [f"any forward takes as long as the products of {FORWARD_TOKENS} tokens"]
                if recipe.training.keeps_base and shape.cached
                else []
            ),
            *([OWN_TEXT] if recipe.training.on_policy.share else []),
            *([f"several devices keep {SCALING} of their speed"] if launch.processes > 1 else []),
        ],
    }
