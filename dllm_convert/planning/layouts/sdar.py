"""SDAR's layout: Qwen3 with its own names, for SGLang and LMDeploy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dllm_convert.planning.layouts.target import (
    SGLANG,
    Converted,
    Refusal,
    Target,
    common_config,
    config_class,
    decoded_by_blocks,
    families,
    mask_row_is_free,
    sglang_files,
)

_MASK, _ROWS = 151669, 151936
"""Hard-coded in SGLang 0.5.23 and LMDeploy 0.18; Qwen3's tokenizer ends below."""


def _refusals(converted: Converted) -> Iterator[Refusal]:
    yield from families(("qwen3",), "SDAR has the norms of queries and keys of Qwen3", converted)
    yield from decoded_by_blocks(converted)
    yield from mask_row_is_free(_MASK, converted)


def _config(converted: Converted, rows: int, mask: int) -> dict[str, Any]:
    return common_config(converted, rows, mask) | {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "attention_bias": False,
        # On a tied head SGLang's loader ends in KeyError: 'lm_head.weight'.
        "tie_word_embeddings": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": converted.config["num_hidden_layers"],
        "fuse_cross_entropy": False,
    }


def _files(converted: Converted) -> Mapping[str, str]:
    return {
        "configuration_sdar.py": config_class("SDARConfig", "sdar"),
        **sglang_files(converted),
    }


TARGET = Target(
    name="sdar",
    engines=("SGLang", "LMDeploy"),
    summary="SDAR: Qwen3, block diffusion",
    refusals=_refusals,
    config=_config,
    names=lambda name: name,
    mask_row=_MASK,
    rows=_ROWS,
    unties=True,
    files=_files,
    launch=(
        SGLANG,
        "lmdeploy serve api_server {out} --trust-remote-code --dllm-block-length {block}",
    ),
)
