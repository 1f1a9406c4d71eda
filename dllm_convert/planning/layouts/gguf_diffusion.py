"""GGUF under the architectures that llama.cpp's diffusion example decodes: whole texts, no cache.

Llama and Mistral have the graph of LLaDA, Qwen2 that of Dream, and Qwen3 that of RND1 where its one
expert is the layer: the router has nothing to choose, and its softmax over one is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dllm_convert.planning.layouts.gguf import (
    QKV,
    GgufLayout,
    Stored,
    as_in_the_graph,
    biases,
    model_keys,
    model_tensors,
    ropes,
    size_of,
)
from dllm_convert.planning.layouts.target import (
    Converted,
    Refusal,
    families,
    masks_only,
    no_window,
)

GRAPHS: Mapping[str, str] = {
    "llama": "llada",
    "mistral": "llada",
    "qwen2": "dream",
    "qwen3": "rnd1",
}
"""Family to architecture."""
_EXPERTS = ("ffn_gate", "ffn_up", "ffn_down")


def _whole_texts(converted: Converted) -> Iterator[Refusal]:
    if converted.section.objective != "mdlm":
        yield Refusal(
            "it is bd3lm, and llama-diffusion-cli lets every token see the whole text",
            "Export --to gguf, or convert with --to mdlm",
        )


def _square(converted: Converted) -> Iterator[Refusal]:
    if GRAPHS.get(converted.adapter.model_type) != "dream":
        return
    width, hidden = size_of(converted, "queries"), size_of(converted, "hidden_size")
    if width != hidden:
        yield Refusal(
            f"its heads are {width} wide together, and Dream's have the hidden size, {hidden}",
            "Export --to gguf",
        )


def _refusals(converted: Converted) -> Iterator[Refusal]:
    why = "llama.cpp decodes no architecture with that graph"
    yield from families(tuple(GRAPHS), why, converted)
    rules = (_whole_texts, masks_only, no_window, partial(ropes, GRAPHS), as_in_the_graph, _square)
    for rule in rules:
        yield from rule(converted)
    yield from biases({"qwen2": QKV}, converted)


def _graph(converted: Converted) -> str:
    return GRAPHS[converted.adapter.model_type]


def _keys(converted: Converted) -> dict[str, Any]:
    graph = _graph(converted)
    found = model_keys(graph, converted)
    if graph == "rnd1":
        found |= {
            "rnd1.expert_count": 1,
            "rnd1.expert_used_count": 1,
            "rnd1.expert_feed_forward_length": found["rnd1.feed_forward_length"],
        }
    return found


def _tensors(converted: Converted) -> tuple[Stored, ...]:
    graph = _graph(converted)
    plain = model_tensors(graph, converted)
    return plain if graph != "rnd1" else tuple(_with_experts(plain, converted))


def _with_experts(tensors: tuple[Stored, ...], converted: Converted) -> Iterator[Stored]:
    """Yield matrices of a layer's network as those of its one expert, each behind its router's."""
    width = size_of(converted, "hidden_size")
    for stored in tensors:
        stem, _, suffix = stored.name.rpartition(".")
        layer, _, part = stem.rpartition(".")
        if part not in _EXPERTS:
            yield stored
            continue
        if part == "ffn_gate":
            yield Stored(f"{layer}.ffn_gate_inp.weight", None, (1, width), exact=True)
        yield replace(stored, name=f"{stem}_exps.{suffix}", shape=(1, *stored.shape))


def _limits(converted: Converted) -> tuple[str, ...]:
    return (
        "The width of a text is that of `-ub`; prompt and new tokens together have to fit, or the "
        "program prints that generation failed and ends with code 0.",
        "`--temp 0` alone still draws; `--top-k 1` does not, and then every token counts as "
        "certain, so that text is filled in from left to right.",
        "It decodes with its own sampler; `dllm-convert sample` takes this file too, with the "
        "settings of `generate`.",
        "Nothing here says how good the model is; its own card does.",
    )


TARGET = GgufLayout(
    name="gguf-diffusion",
    engines=("llama-diffusion-cli",),
    summary="GGUF: a diffusion architecture of llama.cpp, masked diffusion",
    refusals=_refusals,
    launch=(
        "llama-diffusion-cli -m {out} -p 'A list is' -ub 128 -b 128 -c 128 --diffusion-steps 128 "
        "--diffusion-block-length 128 -fa off",
        "dllm-convert sample {out} --prompt 'A list is'",
    ),
    architecture=_graph,
    keys=_keys,
    tensors=_tensors,
    limits=_limits,
    rules_out_mask=False,
)
