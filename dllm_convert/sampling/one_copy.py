"""A conversion that LoRA trained and the base it was merged into, with one copy of the weights.

Beside merged weights `--keep-adapter` leaves the adapter. Taken apart again they are the base, and
a product of low rank on top (LoRA, arXiv 2106.09685): with it the conversion drafts, without it the
base verifies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from dllm_convert.modeling.published.gated import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    PREFIX,
)
from dllm_convert.source.safetensors_header import load_json_object

_NEAR = 2.0**-8
"""What rounding of merged weights to bfloat16 changes stays below this share of their norm."""


class _Added:
    """Adds scale B A x to what a linear layer returns; a hook of that layer.

    Args:
        down: A, shape (rank, inputs).
        up: scale B, shape (outputs, rank).
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        self.down, self.up = down, up

    def __call__(
        self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        low = nn.functional.linear(inputs[0], self.down)
        return output + nn.functional.linear(low, self.up)


@torch.no_grad()
def share_weights(model: Any, base: Any, folder: Path) -> bool:
    """Have a conversion compute with its base's weights and the adapter that lies beside it.

    What it computes is the same but for rounding. Weights that were trained whole (embeddings,
    norms) stay its own.

    Args:
        model: The conversion, loaded from `folder`; it is changed.
        base: Its base, of the stock class, of the same type on the same device.
        folder: The checkpoint.

    Returns:
        Whether it does; not where no adapter was kept, or that is of another base.
    """
    if not (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file() or model.is_gated:
        return False
    added = _taken_apart(model, base, folder / ADAPTER_FOLDER)
    if not added:
        return False
    theirs = dict(base.named_modules())
    for name, module in model.named_modules():
        for kind, own in module._parameters.items():
            its = getattr(theirs.get(name), kind, None)
            if own is None or its is None or own.shape != its.shape or own.dtype != its.dtype:
                continue
            if (kind == "weight" and name in added) or torch.equal(own, its):
                module._parameters[kind] = its
    for name, hook in added.items():
        model.get_submodule(name).register_forward_hook(hook)
    return True


def _taken_apart(model: Any, base: Any, folder: Path) -> Mapping[str, _Added]:
    """Return what is added to each layer of a base; nothing if that is not the model."""
    config, states = load_json_object(folder / ADAPTER_CONFIG), load_file(folder / ADAPTER_WEIGHTS)
    end, found = ".lora_A.weight", dict[str, _Added]()
    theirs = dict(base.named_modules())
    for key in states:
        if not key.endswith(end):
            continue
        name = key.removeprefix(PREFIX).removesuffix(end)
        other = theirs.get(name)
        if not isinstance(other, nn.Linear):
            return {}
        whole, plain = model.get_submodule(name).weight, other.weight
        down = states[key].to(plain.device, torch.float32)
        up = states[key.replace("lora_A", "lora_B")].to(plain.device, torch.float32)
        up = up * (config["lora_alpha"] / config["r"])
        if whole.shape != plain.shape:
            return {}
        apart = (plain.float().addmm(up, down) - whole.float()).norm()
        if apart > _NEAR * whole.float().norm():
            return {}
        found[name] = _Added(down.to(plain.dtype), up.to(plain.dtype))
    return found
