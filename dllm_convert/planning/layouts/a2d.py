"""dLLM's a2d classes: the weights as they are, under a config of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dllm_convert.planning.layouts.target import (
    Converted,
    Refusal,
    Target,
    families,
    masks_only,
    no_window,
    open_context,
)

_CLASSES = {
    "llama": "A2DLlamaLMHeadModel",
    "qwen2": "A2DQwen2LMHeadModel",
    "qwen3": "A2DQwen3LMHeadModel",
}


def _refusals(converted: Converted) -> Iterator[Refusal]:
    yield from families(tuple(_CLASSES), "dLLM has no a2d class of that family", converted)
    for rule in (masks_only, open_context, no_window):
        yield from rule(converted)
    if converted.section.mask_token_id >= converted.tokens:
        yield Refusal(
            "its tokenizer does not know the mask, and dLLM asks the tokenizer for it",
            "Convert it again: dllm-convert run adds the mask to the tokenizer",
        )


def _config(converted: Converted, rows: int, mask: int) -> dict[str, Any]:
    family = converted.adapter.model_type
    left_out = ("auto_map", "is_causal", "diffusion", "rope_scaling")
    return {key: value for key, value in converted.config.items() if key not in left_out} | {
        "architectures": [_CLASSES[family]],
        "model_type": f"a2d-{family}",
        "rope_theta": converted.rope["rope_theta"],
        "rope_parameters": dict(converted.rope),
        "mask_token_id": mask,
        "vocab_size": rows,
    }


TARGET = Target(
    name="a2d",
    engines=("dLLM",),
    summary="dLLM's classes, block and masked diffusion, with and without token shift",
    refusals=_refusals,
    config=_config,
    names=lambda name: name,
    launch=(
        "# in dLLM, with transformers 4.57: its {sampler} on {out}, right_shift_logits={shift}",
    ),
)
