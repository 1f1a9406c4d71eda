"""Host memory of processes that train together on GPUs: what each of them takes, and a machine.

Under FSDP2 every process reads its own shards into its GPU, and the first one writes tensor by
tensor (`training/shards.py`, `training/streamed.py`). Elsewhere each process loads the whole model
into host memory before it is moved or cut up, and the first one puts all weights together to write
them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from dllm_convert.planning.costs import CPU_RUNTIME, lora_parameters, trainable_parameters
from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.recipe.schema import Recipe

_FLOAT32, _BF16 = 4, 2
_PIECE = 1 << 26
"""Bytes that are read, or cast, at once."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory at the peak of each part of a training.

    Attributes:
        loading: Of each process, while weights come from the files.
        training: Of each process, while steps are taken.
        saving: Of the process that takes most while a checkpoint is written.
        writing: Of the first process, while the result is written.
        process: Of the process that takes most, at its peak.
        machine: Of the machine that takes most, at its peak.
    """

    loading: int
    training: int
    saving: int
    writing: int
    process: int
    machine: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def host_memory(
    shape: ModelShape,
    recipe: Recipe,
    *,
    processes: int,
    per_machine: int,
    strategy: str,
    offload: Collection[str] = (),
    bf16: bool = True,
) -> HostMemory:
    """Estimate the host memory of a training on GPUs.

    Args:
        shape: The model.
        recipe: The resolved recipe.
        processes: How many train together.
        per_machine: How many of them are on each machine.
        strategy: What they share, as a `Launch` names it.
        offload: What lies in host memory while it trains: `weights`, `moments`.
        bf16: Whether frozen weights are held in 16 bits.
    """
    training = recipe.training
    full, trained = training.method == "full", trainable_parameters(shape, training)
    held = _FLOAT32 if full or not bf16 else _BF16
    quantized = training.method == "lora" and training.lora.quantize != "none"
    # Classes with experts put them together out of several tensors, of which no part can be read.
    whole = quantized or shape.matrices < shape.stored_matrices
    sharded = strategy == "fsdp2" and not whole
    shares = processes if strategy in ("fsdp1", "fsdp2", "zero") else 1
    # A base that teaches a full training is loaded whole, by each.
    teacher = shape.parameters * (_BF16 if bf16 else _FLOAT32)
    teacher = teacher if full and training.learns_from_base else 0
    largest = _largest(shape)
    # Adapters are drawn by each process, whole, before they are cut up.
    drawn = 0 if full else _FLOAT32 * lora_parameters(shape, training)
    loading = (_PIECE + drawn if sharded else held * shape.parameters + drawn) + teacher
    # With the moments go the gradients, and the float32 copy that DeepSpeed steps.
    stepped = 8 + _FLOAT32 * (2 if strategy == "zero" else 1)
    kept = {"weights": held * shape.parameters, "moments": stepped * trained}
    steps = sum(kept[part] for part in offload if part in kept) // shares
    if training.optimizer.startswith("paged"):
        steps += 2 * trained // shares
    if strategy in ("fsdp1", "fsdp2"):
        # Torch's distributed checkpoint writes the parts of one tensor after another.
        first = other = _FLOAT32 * largest // shares + _PIECE
    elif strategy == "zero":
        # DeepSpeed keeps what a process holds of the masters, and of a moment, in one tensor.
        first = other = _FLOAT32 * trained // shares
    else:
        first, other = _FLOAT32 * trained, 0
    way = "fsdp1" if strategy == "fsdp2" and whole else strategy
    writing = _written(shape, held, trained, way, quantized=quantized, full=full)
    if training.keeps_base:
        writing = _FLOAT32 * trained
    parts = {
        "loading": (loading, loading),
        "training": (steps, steps),
        "saving": (steps + first, steps + other),
        "writing": (steps + writing, steps),
    }
    beside = per_machine - 1
    return HostMemory(
        **{part: CPU_RUNTIME + max(found) for part, found in parts.items()},
        process=CPU_RUNTIME + max(most for most, _ in parts.values()),
        machine=CPU_RUNTIME * per_machine
        + max(most + beside * others for most, others in parts.values()),
    )


def _written(
    shape: ModelShape, held: int, trained: int, strategy: str, *, quantized: bool, full: bool
) -> int:
    """Bytes that the first process takes to write the result, beside what all hold anyway."""
    if strategy == "fsdp2":
        # One tensor, with what was trained beside it where that is merged into it.
        largest = _largest(shape)
        return _PIECE + (_FLOAT32 * largest if full else 2 * held * largest + _FLOAT32 * trained)
    if quantized or strategy in ("fsdp1", "zero"):
        # Gathered, and a model that they are put into.
        return 2 * held * shape.parameters + _FLOAT32 * (0 if full else trained)
    # The files' bytes, put together from the GPU.
    return _BF16 * shape.parameters


def _largest(shape: ModelShape) -> int:
    """Parameters of the largest tensor: a vocabulary, or a third of what a layer has."""
    return max(shape.vocabulary_matrix, shape.stored_matrices // max(shape.layers, 1) // 3)
