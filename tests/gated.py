"""Gated conversions of tiny checkpoints, with an adapter that does something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conversion import convert
from safetensors.torch import load_file, save_file

from dllm_convert.planning.conversion import ConversionPlan

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ADAPTER = "adapter/adapter_model.safetensors"
BLOCK = 8


def gated_folder(
    base: Path, folder: Path, *, filled: bool = True, draft: str = "auto", **fields: Any
) -> ConversionPlan:
    """Write a gated conversion; `filled` gives it an adapter that moves every noisy token."""
    training = {"method": "lora", "lora": {"rank": 4, "acts_on": "noisy"}}
    asked = {"training": training, "block_attention": draft, **fields}
    plan = convert(base, folder, "bd3lm", block=BLOCK, **asked)
    if filled:
        draws = torch.Generator().manual_seed(1)
        states = load_file(folder / ADAPTER)
        for name in sorted(states):
            states[name] = 0.2 * torch.randn(states[name].shape, generator=draws)
        save_file(states, folder / ADAPTER, {"format": "pt"})
    return plan
