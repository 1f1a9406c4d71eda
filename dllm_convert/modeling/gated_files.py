"""The files of a gated adapter: PEFT's names and format, in a folder inside the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.common.json_files import write_json
from dllm_convert.modeling.bundle import MODELING_MODULE
from dllm_convert.modeling.published.gated import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def write_adapter_weights(folder: Path, states: Mapping[str, torch.Tensor]) -> None:
    """Write the adapter's tensors, in float32.

    Args:
        folder: Folder of the adapter; made if it is not there.
        states: Tensors by the names that PEFT gives them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        name: states[name].detach().float().cpu().contiguous().clone() for name in sorted(states)
    }
    # The library's own writing to a file leaves it to its owner alone, whatever the umask says.
    (folder / ADAPTER_WEIGHTS).write_bytes(save(held, {"format": "pt"}))


def write_adapter_config(
    folder: Path,
    section: DiffusionSection,
    *,
    diffusion_class: str,
    base: str,
    revision: str | None,
) -> None:
    """Write what PEFT calls the adapter's config.

    Args:
        folder: Folder of the adapter.
        section: What the conversion is.
        diffusion_class: The class that gates it. PEFT alone would let it act on every token; told
            of a class that it does not find, it stops.
        base: Hub id or name of the base.
        revision: Commit of the base on the Hub.
    """
    write_json(
        folder / ADAPTER_CONFIG,
        {
            "auto_mapping": {
                "base_model_class": diffusion_class,
                "parent_library": MODELING_MODULE,
            },
            "base_model_name_or_path": base,
            "bias": "none",
            "inference_mode": True,
            "lora_alpha": section.adapter_alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": section.adapter_rank,
            "revision": revision,
            "target_modules": list(section.adapter_targets),
            "task_type": None,
        },
    )
