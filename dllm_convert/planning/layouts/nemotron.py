"""Nemotron-Labs-Diffusion's layout: Llama and Mistral behind a strictly causal context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dllm_convert.planning.layouts.target import (
    MLX_VLM,
    Converted,
    Refusal,
    Target,
    blocks_only,
    common_config,
    config_class,
    families,
    masks_only,
    no_shift,
    no_window,
    open_blocks,
)

_ROPES = ("default", "linear", "llama3", "yarn")
"""Read by mlx-vlm 0.7.10 as transformers reads them: its logits are ours."""
_HEAD, _BODY = "lm_head.", "model."


def _refusals(converted: Converted) -> Iterator[Refusal]:
    yield from families(
        ("llama", "mistral"),
        "its layers are Llama's, without norms or biases of queries and keys",
        converted,
    )
    for rule in (blocks_only, no_shift, masks_only, open_blocks, no_window):
        yield from rule(converted)
    if converted.section.context != "causal":
        yield Refusal(
            "its finished blocks see all of their own block, and the engine reads them strictly "
            "causally and takes the first token of each from a next-token head",
            "Convert with --set training.ar_loss_weight=1",
        )
    biased = [end for end in ("q_proj.bias", "o_proj.bias", "up_proj.bias") if converted.has(end)]
    if biased:
        yield Refusal(
            f"it has biases ({', '.join(biased)}), and the engine adds none to queries and keys",
            "No export of it is right; sample it with dllm-convert",
        )
    kind = converted.rope.get("rope_type", "default")
    if kind not in _ROPES:
        yield Refusal(
            f"its rotary embedding is of type {kind}, and the engine was seen to read "
            f"{', '.join(_ROPES)}",
            "No export of it is right; sample it with dllm-convert",
        )


def _config(converted: Converted, rows: int, mask: int) -> dict[str, Any]:
    return common_config(converted, rows, mask) | {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "auto_map": {
            "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig"
        },
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        # Anything but "ar" starts mlx-vlm's denoising.
        "default_generation_mode": "diffusion",
        "default_diffusion_steps": converted.section.block_size,
        "default_block_length": converted.section.block_size,
        "dlm_paradigm": "bidirectional",
    }


def _names(name: str) -> str:
    if name.startswith(_HEAD):
        return "diffusion_head." + name.removeprefix(_HEAD)
    return "encoder." + name.removeprefix(_BODY)


TARGET = Target(
    name="nemotron",
    engines=("vLLM", "mlx-vlm"),
    summary="Nemotron-Labs-Diffusion: block diffusion behind a strictly causal context",
    refusals=_refusals,
    config=_config,
    names=_names,
    unties=True,
    files=lambda _: {
        "configuration_nemotron_labs_diffusion.py": config_class(
            "NemotronLabsDiffusionConfig", "nemotron_labs_diffusion"
        )
    },
    launch=("vllm serve {out} --trust-remote-code", MLX_VLM),
)
