"""Peak memory of every stage of a run: the largest decides what fits.

Beside its training a run measures: the untrained conversion and its base, the result, what the
pictures show, a sample; and it verifies. Each holds one model at a time and keeps nothing for a
backward pass: weights, what one layer computes, and logits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dllm_convert.planning.costs import (
    CPU_RUNTIME,
    GPU_RUNTIME,
    Memory,
    trainable_parameters,
)
from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.recipe.schema import Recipe

_FLOAT32, _BF16 = 4, 2
_PIECE = {True: 1 << 26, False: 1 << 20}
"""Entries of logits that the loss has in float32 at once, on a GPU and on a CPU."""
_INFLUENCE = 3 * 512
"""Tokens whose logits an influence map or a probe holds at once: text, changed, difference."""
_RATES, _RATES_WIDTH = 5, 128
"""Views of a row that is masked at five rates, and its least width."""
_ADAPT = 16 << 20
"""Bytes that the untrained conversion takes: files are copied in pieces, rows are written alone."""
DURING = ("adapt", "baseline", "train", "measure", "views", "sample", "verify")
"""The stages, in the order of a run, as its journal names them."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes at the peak of one stage.

    Attributes:
        stage: Its name in the journal.
        held: What the weights are held in: float32, bfloat16 or nf4; empty without a model.
        device: Bytes of the device that computes; on a CPU its memory.
        host: Bytes of host memory beside a GPU; on a CPU the same as `device`.
    """

    stage: str
    held: str
    device: int
    host: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def stage_memory(
    shape: ModelShape, recipe: Recipe, training: Memory, *, gpu: bool, bf16: bool, causal: bool
) -> tuple[StageMemory, ...]:
    """Estimate the peak of every stage of a run that trains, in the order of `DURING`.

    Args:
        shape: The model.
        recipe: The resolved recipe; what is measured runs as many rows at once as it names.
        training: The peak of its training.
        gpu: Whether the device is a GPU. There it is measured in the type of its matrix products:
            what trains in 4 bits is measured as it will be published, in 16.
        bf16: Whether that is bfloat16.
        causal: Whether the base has an autoregressive likelihood, which is measured too.
    """
    held = _BF16 if gpu and bf16 else _FLOAT32
    runtime = GPU_RUNTIME if gpu else CPU_RUNTIME
    weights = runtime + held * shape.parameters
    nelbo = _nelbo_bytes(shape, recipe, held, gpu=gpu)
    # Decoding on a CPU keeps a second copy of the matrices, in the order that they are read.
    packed = 0 if gpu else _FLOAT32 * (shape.stored_matrices + shape.vocabulary_matrix)
    probes = _INFLUENCE * shape.vocabulary
    # A fresh process runs the folder's own code while the first waits for it.
    beside = CPU_RUNTIME + _FLOAT32 * shape.parameters
    devices = {
        "adapt": 0 if gpu else CPU_RUNTIME + _ADAPT,
        "baseline": weights
        + max(nelbo, _autoregressive_bytes(shape, recipe, held) if causal else 0),
        "train": training.total,
        "measure": weights + nelbo,
        "views": weights + max(_rates_bytes(shape, recipe, held, gpu=gpu), probes * held, packed),
        "sample": weights + packed,
        "verify": weights + probes * held + (0 if gpu else beside),
    }
    loaded = CPU_RUNTIME + held * shape.parameters
    hosts = dict.fromkeys(DURING, loaded) | {
        "adapt": CPU_RUNTIME + _ADAPT,
        "train": CPU_RUNTIME + _host_of_training(shape, recipe, held),
        "verify": 2 * beside + probes * _FLOAT32,
    }
    names = {_FLOAT32: "float32", _BF16: "bfloat16"}
    lora = recipe.training.method == "lora"
    # Whole weights are trained in float32; frozen ones are held as they are measured.
    trained = names[held] if lora else names[_FLOAT32]
    if lora and recipe.training.lora.quantize != "none":
        trained = recipe.training.lora.quantize
    in_type = dict.fromkeys(DURING, names[held]) | {"adapt": "", "train": trained}
    return tuple(
        StageMemory(
            stage=name,
            held=in_type[name],
            device=devices[name],
            host=hosts[name] if gpu else devices[name],
        )
        for name in DURING
    )


def largest_stage(stages: tuple[StageMemory, ...], *, alone: bool = False) -> StageMemory:
    """Return the stage that decides what fits.

    Verification skips what has no room, so it does not decide; nor does host memory beside a GPU,
    which the plan does not know.

    Args:
        stages: All of them.
        alone: Leave the training out, which several devices share.
    """
    aside = {"verify", "train"} if alone else {"verify"}
    deciding = [stage for stage in stages if stage.stage not in aside]
    return max(deciding, key=lambda stage: stage.device)


def _layer_bytes(shape: ModelShape, tokens: int, held: int) -> float:
    """Bytes of what a forward without gradients has at once: one layer, two residual streams."""
    per_layer = (4 * _FLOAT32 + 2 * held) * shape.hidden
    return tokens * (per_layer + 2 * held * shape.outputs / shape.layers)


def _mask_bytes(rows: int, width: int, held: int) -> int:
    """Bytes of a dense mask, and of what attention makes of it."""
    return rows * width**2 * (1 + held)


def _logit_bytes(entries: float, held: int, *, gpu: bool) -> float:
    return entries * held + _FLOAT32 * min(entries, _PIECE[gpu])


def _nelbo_bytes(shape: ModelShape, recipe: Recipe, held: int, *, gpu: bool) -> int:
    """Bytes of the bound's forward: a half of the tokens is masked, on the average."""
    rows, length = recipe.training.sequences_per_forward, recipe.data.sequence_length
    width = length if recipe.target == "mdlm" else 2 * length - (recipe.block_size or 1)
    share = 1.0 if not recipe.noise.masks else 0.5
    logits = _logit_bytes(rows * length * share * shape.vocabulary, held, gpu=gpu)
    mask = _mask_bytes(rows, width, held)
    return round(max(_layer_bytes(shape, rows * width, held), logits) + mask)


def _autoregressive_bytes(shape: ModelShape, recipe: Recipe, held: int) -> int:
    """Bytes of the base's own likelihood: logits of all tokens, in float32, and of those logs."""
    rows, length = recipe.training.sequences_per_forward, recipe.data.sequence_length
    copies = held + _FLOAT32 + (_FLOAT32 if held < _FLOAT32 else 0)
    logits = rows * length * shape.vocabulary * copies
    return logits + _mask_bytes(rows, length, held)


def _rates_bytes(shape: ModelShape, recipe: Recipe, held: int, *, gpu: bool) -> int:
    """Bytes of a row at five rates at once."""
    block = recipe.block_size or 0
    text = min(max(_RATES_WIDTH, 2 * block), recipe.data.sequence_length)
    rows, width = (_RATES, text) if recipe.target == "mdlm" else (1, (_RATES + 1) * text - block)
    logits = _logit_bytes(_RATES * text * 0.5 * shape.vocabulary, held, gpu=gpu)
    layer = _layer_bytes(shape, rows * width, held)
    return round(max(layer, logits) + _mask_bytes(rows, width, held))


def _host_of_training(shape: ModelShape, recipe: Recipe, held: int) -> int:
    """Bytes of host memory of a training on a GPU: it is loaded there, and written from there."""
    training = recipe.training
    loaded = shape.parameters * (_FLOAT32 if training.method == "full" else held)
    moments = training.optimizer.startswith("paged")
    paged = 2 * trainable_parameters(shape, training) if moments else 0
    # Files are put together in memory before they are written.
    written = held * shape.parameters
    if training.method == "lora" and training.lora.quantize != "none":
        # The adapter is merged into weights of 16 bits, which are loaded for it.
        written += loaded + _FLOAT32 * trainable_parameters(shape, training)
        loaded = 0
    return max(loaded, written) + paged
