"""Each process reads its own shards from the files: none holds the whole model.

The model is built without its weights (`modeling.hollow`), Accelerate shards it on the meta device,
and then every process reads the rows it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dllm_convert.modeling.hollow import names_of, plain_name, replace_parameters
from dllm_convert.modeling.slices import Slices


def is_empty(model: Any) -> bool:
    """Whether a model waits for its weights."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def fill_trained_rows(model: nn.Module, folder: Path) -> None:
    """Read the rows of embeddings that PEFT trains by themselves, as they are before a training.

    Args:
        model: With adapters; its matrices may be empty.
        folder: The checkpoint it was built of.
    """
    slices = Slices(folder)
    for name, layer in model.named_modules():
        if not isinstance(layer, TrainableTokensLayer):
            continue
        source = plain_name(f"{name}.base_layer.weight")
        for adapter, rows in layer.token_indices.items():
            for into in (layer.trainable_tokens_delta, layer.trainable_tokens_original):
                held = into[adapter].data
                for at, row in enumerate(rows):
                    slices.fill(source, held[at : at + 1], (row, *[0] * (held.ndim - 1)))


@torch.no_grad()
def fill_shards(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Read into each parameter that waits for its weights the part this process holds of it.

    Args:
        model: As FSDP2 sharded it, with adapters or without.
        folder: The checkpoint it was built of.
        device: Where the weights go.
    """
    slices, names = Slices(folder), names_of(model)

    def filled(parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.device.type != "meta":
            return None
        name = next(name for name in names[parameter] if name in slices)
        if not isinstance(parameter, DTensor):
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            slices.fill(name, whole)
            return nn.Parameter(whole, requires_grad=parameter.requires_grad)
        mesh, placements = parameter.device_mesh, parameter.placements
        size, first = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        part = torch.empty(size, dtype=parameter.dtype, device=device)
        slices.fill(name, part, first)
        shape, stride = parameter.shape, parameter.stride()
        held = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return nn.Parameter(held, requires_grad=parameter.requires_grad)

    replace_parameters(model, filled)


def parameter_names(model: Any, optimizer: Any) -> list[list[str]]:
    """Return what the parameters of each group of an optimizer are called in the model."""
    names = {weight: own_name(name) for name, weight in model.named_parameters()}
    return [[names[weight] for weight in group["params"]] for group in optimizer.param_groups]


def hand_over(model: nn.Module, optimizer: Any, groups: list[list[str]]) -> None:
    """Have an optimizer move the parameters that a model has now.

    Accelerate finds the sharded ones by the addresses of those before; on the meta device there are
    none.

    Args:
        model: As it is trained.
        optimizer: Without a state yet.
        groups: What `parameter_names` returned before the model was sharded.
    """
    found = {own_name(name): weight for name, weight in model.named_parameters()}
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [found[name] for name in wanted]


def own_name(name: str) -> str:
    """Return a parameter's name without what Accelerate may put around its module."""
    return "".join(name.split("_checkpoint_wrapped_module.")).replace("_orig_mod.", "")
