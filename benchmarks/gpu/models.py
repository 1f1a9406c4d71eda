"""Models of known sizes with random weights, text for them, and what the plan says of both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.devices import current_device
from benchmarks.steps import Columns
from dllm_convert.adapters import get_adapter
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.planning.costs import GPU_RUNTIME, peak_memory
from dllm_convert.planning.devices import GPUS, UTILISATION, Device, this_cpu
from dllm_convert.planning.estimate import settled, uses_bf16, uses_flex
from dllm_convert.planning.mask_token import MaskTokenDecision
from dllm_convert.planning.model_shape import ModelShape, model_shape
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo, TensorInfo, TokenizerInfo

ADAPTER = get_adapter("qwen2")
MASK = 5
_FIRST_WORD = 10
"""Ids below are kept for what is no text."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, in the words of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = True


SIZES = {
    "tiny": Sizes(512, 64, 128, 3, 4, 2),
    # 28 layers that take a device no time: what is left is the host's.
    "nil": Sizes(64, 32, 32, 28, 2, 1),
    "135M": Sizes(49153, 576, 1536, 30, 9, 3),
    "1.5B": Sizes(151936, 1536, 8960, 28, 12, 2),
    "7B": Sizes(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False),
}
"""SmolLM2-135M's, Qwen2.5-1.5B's and Qwen2.5-7B's, and two that are nobody's."""


def _config(name: str, target: str | None, block: int) -> Any:
    config: Any = Qwen2Config(
        **vars(SIZES[name]),
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    if target is None:
        return config
    config.is_causal, config.mask_token_id = False, MASK
    if target == "bd3lm":
        config.block_size = block
    config.diffusion = {
        "objective": target,
        "mask_token_id": MASK,
        "token_shift": True,
        "block_size": block if target == "bd3lm" else None,
        "noise_schedule": "linear",
    }
    return config


def build(
    name: str,
    target: str | None = "bd3lm",
    block: int = 16,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Any:
    """Make a model where it is to run, the same weights each time on each kind of device.

    Args:
        name: A key of `SIZES`.
        target: mdlm or bd3lm; None is the autoregressive model of the same sizes.
        block: Block size of bd3lm.
        attention: Implementation, as transformers knows it.
        dtype: Type of the weights.
        device: Where to; None for the one there is.
    """
    torch.manual_seed(0)
    cls: Any = Qwen2ForCausalLM if target is None else diffusion_class(ADAPTER)
    with device or current_device():
        model = cls._from_config(
            _config(name, target, block), attn_implementation=attention, dtype=dtype
        )
    with torch.no_grad():
        # Large enough that predictions differ from token to token.
        model.get_input_embeddings().weight.normal_(0, 0.05)
    model.generation_config.eos_token_id = None
    return model.eval()


@cache
def shape_of(name: str) -> ModelShape:
    """Count a model as the plan counts a checkpoint's headers."""
    model = build(name, None, device=torch.device("meta"))
    names = dict(model.named_parameters())  # a tied head once
    rows = SIZES[name].vocab_size
    source = SourceInfo(
        given=name,
        kind="folder",
        path=None,
        repo_id=None,
        revision=None,
        config=model.config.to_dict(),
        tensors={key: TensorInfo("F32", tuple(w.shape), "") for key, w in names.items()},
        tokenizer=TokenizerInfo({}, frozenset(), frozenset(), rows),
    )
    mask = MaskTokenDecision(
        token="<|mask|>",
        id=MASK,
        rule="reserved",
        reason="",
        new=False,
        write_row=False,
        used_rows=rows,
        tokenizer_size=rows,
        rows_before=rows,
        rows_after=rows,
    )
    found = model_shape(source, ADAPTER, mask)
    if found is None:
        raise RuntimeError(f"{name} tells no shapes")
    return found


def this_device() -> Device:
    """Describe what is here as the plan does."""
    if not torch.cuda.is_available():
        return this_cpu()
    card = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported()
    return Device(card.name, 0, card.total_memory, gpu=True, bf16=bf16, source="this machine")


def peak_flops(card: str) -> float | None:
    """Dense bfloat16 operations per second by the data sheet; None of a card without one here."""
    for device in GPUS:
        if device.name.split()[0] in re.split(r"[\s-]+", card):
            return device.flops / UTILISATION
    return None


def recipe_of(
    target: str, block: int, length: int, rows: int, name: str = "tiny", **training: Any
) -> Recipe:
    """Return a recipe with what it leaves to the device chosen for the one that is here.

    Args:
        target: mdlm or bd3lm.
        block: Block size of bd3lm.
        length: Tokens of a row.
        rows: Rows of a forward.
        name: The model that is to be trained.
        **training: Fields of its section; `noise` is a section of its own.
    """
    noise = training.pop("noise", {})
    recipe = Recipe.model_validate(
        {
            "source": "random",
            "target": target,
            "block_size": block if target == "bd3lm" else None,
            "noise": noise,
            "data": {"sequence_length": length},
            "training": {"batch_size": rows, "learning_rate": 1e-4, **training},
        }
    )
    return settled(shape_of(name), recipe, this_device())


def planned_bytes(name: str, recipe: Recipe) -> int:
    """Peak that the plan promises, without what CUDA itself takes."""
    device = this_device()
    memory = peak_memory(
        shape_of(name),
        recipe,
        gpu=device.gpu,
        bf16=uses_bf16(recipe, device),
        flex=uses_flex(recipe, gpu=device.gpu),
    )
    return memory.total - (GPU_RUNTIME if device.gpu else memory.runtime)


def columns(
    rows: int, length: int, seed: int = 0, vocabulary: int = 500, documents: int = 1
) -> Columns:
    """Random text as the package's data gives it, on the host, each (rows, length).

    Args:
        rows: Rows.
        length: Tokens of each.
        seed: Of the tokens.
        vocabulary: Ids are below.
        documents: Of each row, about equally long.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(_FIRST_WORD, vocabulary, (rows, length), generator=generator)
    segments = torch.arange(length) * documents // length
    first = torch.arange(length).where(segments.diff(prepend=segments[:1] - 1) != 0, 0)
    positions = torch.arange(length) - first.cummax(-1).values
    return {
        "input_ids": tokens,
        "segment_ids": segments.expand(rows, -1).contiguous(),
        "position_ids": positions.expand(rows, -1).contiguous(),
        "loss_mask": torch.ones_like(tokens, dtype=torch.bool),
    }
