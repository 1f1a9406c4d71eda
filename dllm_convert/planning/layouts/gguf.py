"""GGUF under the architectures that llama.cpp knows: keys, names and the order of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from dllm_convert.adapters.tensors import ClassTensors, sizes_of
from dllm_convert.planning.layouts.target import (
    Converted,
    Layout,
    Refusal,
    families,
    no_window,
    open_blocks,
)
from dllm_convert.source.gguf import CONFIG_KEYS, ggml_name

SHIFT_KEY = "diffusion.shift_logits"
"""Read by llama.cpp's diffusion example, which takes it for true where it is absent."""
BLOCK_KEY = "diffusion.block_size"
"""Ours: nothing in llama.cpp knows of blocks."""
FACTORS = "rope_freqs.weight"
"""Tensor of factors of rotary frequencies, which no tensor of a conversion is."""
_EPS = 1e-6
"""What the four classes take where config.json says nothing."""
_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
_YARN_AS_IS = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True}
"""Settings of YaRN that llama.cpp has built in, with the values that it has."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Attributes:
        name: As ggml has it.
        source: Tensor of the conversion; None for one that is computed.
        shape: Sizes, outermost first.
        heads: Heads whose rows llama.cpp wants in pairs, 0 for rows as they are: its rotary
            embedding turns neighbours where transformers turns the two halves of a head.
        values: Of a computed one, in order; none for zeros.
        exact: Whether it is float32 whatever the matrices are.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    heads: int = 0
    values: tuple[float, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class GgufLayout(Layout):
    """A layout in one GGUF file.

    Attributes:
        architecture: Name that llama.cpp has for the graph, given the checkpoint.
        keys: Metadata of the model, given the checkpoint; the tokenizer's is made of its files.
        tensors: All tensors of the file, given the checkpoint.
        limits: What who runs the file has to know.
        rules_out_mask: Whether who decodes never writes the mask, however likely it is.
    """

    architecture: Callable[[Converted], str]
    keys: Callable[[Converted], dict[str, Any]]
    tensors: Callable[[Converted], tuple[Stored, ...]]
    limits: Callable[[Converted], tuple[str, ...]]
    rules_out_mask: bool = True


STOCK: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""Family to the architecture whose graph is the stock one; Mistral without a window is Llama."""
_IN_PAIRS = frozenset({"llama", "llada"})
_FACTORS = frozenset({"llama"})
"""Graphs that read factors of rotary frequencies."""


def size_of(converted: Converted, name: str) -> int:
    """Return a size of the class, as it reads the config: what that leaves out has a default."""
    # Families of llama.cpp are all declared, which is asked first.
    return sizes_of(cast(ClassTensors, converted.adapter.tensors), converted.config)[name]


def model_keys(architecture: str, converted: Converted) -> dict[str, Any]:
    """Return the metadata that a graph of llama.cpp is built from.

    Args:
        architecture: The graph.
        converted: The checkpoint.
    """
    section, rope = converted.section, converted.rope
    width, eps = size_of(converted, "head_dim"), converted.config.get("rms_norm_eps")
    known = {
        "rope_theta": float(rope.get("rope_theta", 1e4)),
        "rms_norm_eps": _EPS if eps is None else float(eps),
        "vocab_size": converted.entries[converted.adapter.embedding].shape[0],
        "num_key_value_heads": size_of(converted, "keys") // width,
    }
    found = {
        f"{architecture}.{key}": known[name] if name in known else size_of(converted, name)
        for key, name in CONFIG_KEYS.items()
    }
    found |= {
        f"{architecture}.attention.key_length": width,
        f"{architecture}.attention.value_length": width,
        f"{architecture}.rope.dimension_count": width,
        f"{architecture}.attention.causal": False,
        SHIFT_KEY: section.token_shift,
    }
    if rope.get("rope_type", "default") in ("linear", "yarn"):
        found |= {
            f"{architecture}.rope.scaling.type": rope["rope_type"],
            f"{architecture}.rope.scaling.factor": float(rope["factor"]),
        }
    if rope.get("rope_type") == "yarn":
        found[f"{architecture}.rope.scaling.original_context_length"] = _trained_on(converted)
    if section.block_size:
        found[BLOCK_KEY] = section.block_size
    return found


def model_tensors(architecture: str, converted: Converted) -> tuple[Stored, ...]:
    """Return all tensors of a file, those outside the layers first.

    Args:
        architecture: The graph.
        converted: The checkpoint.
    """
    width = size_of(converted, "head_dim")
    heads = {
        ".attn_q.": size_of(converted, "queries") // width,
        ".attn_k.": size_of(converted, "keys") // width,
    }
    found = []
    for source, entry in converted.entries.items():
        name = ggml_name(source)
        paired = next((count for part, count in heads.items() if part in name), 0)
        found.append(
            Stored(
                name,
                source,
                entry.shape,
                heads=paired if architecture in _IN_PAIRS else 0,
                exact=len(entry.shape) < 2,
            )
        )
    if converted.rope.get("rope_type") == "llama3":
        factors = llama3_factors(converted.rope, width, _trained_on(converted))
        found.append(Stored(FACTORS, None, (len(factors),), 0, factors, exact=True))
    return tuple(sorted(found, key=_place))


def _place(stored: Stored) -> tuple[int, str]:
    first, _, rest = stored.name.partition(".")
    return (int(rest.partition(".")[0]) + 1 if first == "blk" else 0, stored.name)


def _trained_on(converted: Converted) -> int:
    """Return the context in which positions were learnt, before they were stretched."""
    told = converted.rope.get("original_max_position_embeddings")
    return int(told or size_of(converted, "max_position_embeddings"))


def llama3_factors(rope: Mapping[str, Any], width: int, old: int) -> tuple[float, ...]:
    """Return by what Llama 3 divides each rotary frequency, (width / 2,).

    Long waves are stretched by `factor`, short ones left alone; between, the two are blended.

    Args:
        rope: Parameters of the rotary embedding.
        width: Width of a head.
        old: Context before positions were stretched.
    """
    factor = float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    found = []
    for pair in range(0, width, 2):
        turns = old / (2 * math.pi * float(rope["rope_theta"]) ** (pair / width))
        # How much of the frequency stays as it is: none below `low` turns, all above `high`.
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - kept) / factor + kept))
    return tuple(found)


def ropes(architectures: Mapping[str, str], converted: Converted) -> Iterator[Refusal]:
    """Refuse rotary embeddings that the graph of a family would turn otherwise."""
    rope = converted.rope
    kind, way_out = rope.get("rope_type", "default"), "Sample it with dllm-convert in torch"
    architecture = architectures.get(converted.adapter.model_type, "")
    known = {"default", "linear", "yarn"} | ({"llama3"} if architecture in _FACTORS else set())
    if kind not in known:
        yield Refusal(
            f"its rotary embedding is of type {kind}, which llama.cpp does not turn in a "
            f"{architecture} graph",
            way_out,
        )
    share = rope.get("partial_rotary_factor", converted.config.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        yield Refusal(f"it turns a part of each head only (partial_rotary_factor {share})", way_out)
    if kind == "yarn":
        other = [
            f"{key} {rope[key]}"
            for key in rope.keys() - _YARN
            if rope[key] is not None and rope[key] != _YARN_AS_IS.get(key)
        ]
        if other:
            yield Refusal(
                f"its YaRN has {', '.join(sorted(other))}, and llama.cpp has its own values there",
                way_out,
            )


def as_in_the_graph(converted: Converted) -> Iterator[Refusal]:
    """Refuse what the graphs of llama.cpp do not compute."""
    way_out = "Sample it with dllm-convert in torch"
    act = converted.config.get("hidden_act") or "silu"
    if act not in ("silu", "swish"):
        yield Refusal(f"its activation is {act}, and llama.cpp computes silu", way_out)


def biases(allowed: Mapping[str, tuple[str, ...]], converted: Converted) -> Iterator[Refusal]:
    """Refuse biases that the graph of a family does not add."""
    family = converted.adapter.model_type
    added = allowed.get(family, ())
    found = sorted(
        {
            ".".join(name.split(".")[-2:])
            for name in converted.entries
            if name.endswith(".bias") and name.split(".")[-2] not in added
        }
    )
    if found:
        yield Refusal(
            f"it has biases ({', '.join(found)}), and llama.cpp's graph of {family} adds "
            + (f"those of {', '.join(added)} only" if added else "none"),
            "Sample it with dllm-convert in torch",
        )


QKV = ("q_proj", "k_proj", "v_proj")
_STOCK_BIASES = {
    "llama": (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": QKV,
}


def _refusals(converted: Converted) -> Iterator[Refusal]:
    yield from families(tuple(STOCK), "llama.cpp has no graph that opens its attention", converted)
    for rule in (open_blocks, no_window, partial(ropes, STOCK), as_in_the_graph):
        yield from rule(converted)
    yield from biases(_STOCK_BIASES, converted)


def _stock(converted: Converted) -> str:
    return STOCK[converted.adapter.model_type]


def _limits(converted: Converted) -> tuple[str, ...]:
    block = converted.section.block_size
    how = (
        f"The context is causal from block to block, and open inside a block of {block}: every "
        "`llama_decode` has to hold one block, with `llama_set_causal_attn(ctx, false)`."
        if block
        else "Every `llama_decode` has to hold the whole text, with `llama_set_causal_attn(ctx, "
        "false)`."
    )
    return (
        "`llama-cli` and `llama-server` write token by token, which this model was not trained to: "
        "`dllm-convert sample` denoises, with llama.cpp's graph and cache and the settings of "
        "`generate`.",
        how,
        "Nothing here says how good the model is; its own card does.",
    )


TARGET = GgufLayout(
    name="gguf",
    engines=("llama.cpp",),
    summary="GGUF: llama.cpp's own graph, decoded by dllm-convert in its KV cache",
    refusals=_refusals,
    launch=("dllm-convert sample {out} --prompt 'A list is'",),
    architecture=_stock,
    keys=lambda converted: model_keys(_stock(converted), converted),
    tensors=lambda converted: model_tensors(_stock(converted), converted),
    limits=_limits,
)
