"""Models without their weights: the structure takes no memory, the numbers stay in the files.

A hollow model stands on the CPU with parameters of one number each, stretched to their shapes, so
that whoever wraps it (PEFT, a gate) puts real tensors beside them; `emptied` turns them into
tensors on the meta device, which is what is sharded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig

from dllm_convert.adapters.base import Adapter
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.modeling.published.gated import load_adapter
from dllm_convert.modeling.slices import Slices

_WRAPPED = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|token_adapter"
    r"|_checkpoint_wrapped_module|_orig_mod)(?=\.)"
)
"""What PEFT, checkpointing and compilation put between the parts of a name."""
_PEFT = "base_model.model."


def hollow_model(
    folder: Path, adapter: Adapter, *, dtype: torch.dtype, attention: str
) -> Any | None:
    """Build the diffusion class of a checkpoint folder without its weights, in evaluation mode.

    Args:
        folder: Converted checkpoint.
        adapter: Its family.
        dtype: Type the weights will be held in.
        attention: Implementation, as transformers names it.

    Returns:
        The model, whose buffers and whose gated adapter are there; None where a parameter is not
        one tensor of the files, as with classes that put theirs together out of several.
    """
    cls = diffusion_class(adapter)
    config = cls.config_class.from_pretrained(folder)
    # As a model's own `from_pretrained` has it: what lies beside the weights is looked for there.
    config.name_or_path = str(folder)
    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=dtype, attn_implementation=attention)
    # Registering a parameter on the meta device makes a new one.
    model.tie_weights()
    slices = Slices(folder)
    if _kept_apart(model) or not _are_in(model, slices):
        return None
    for name, buffer in model.named_buffers():
        if name in slices:
            slices.fill(name, buffer)
    replace_parameters(model, lambda old: _stretched(old) if old.is_meta else None)
    if model.is_gated:
        load_adapter(model, folder, {})
    # What decoding reads, which a class that is built from its config alone does not have.
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _kept_apart(model: Any) -> bool:
    """Whether a class keeps parts of itself in another type than the rest."""
    kept = getattr(model, "_keep_in_fp32_modules", None)
    strictly = getattr(model, "_keep_in_fp32_modules_strict", None)
    return bool(kept or strictly) and model.dtype != torch.float32


def _are_in(model: Any, slices: Slices) -> bool:
    """Whether each parameter is one tensor of the files, and a tied one is there once."""
    for parameter, names in names_of(model).items():
        found = [name for name in names if name in slices]
        if len(found) != 1 or slices.shape(found[0]) != tuple(parameter.shape):
            return False
    return True


def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the parameters of a model with all their names, which for tied ones are several."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(plain_name(name))
    return names


def plain_name(name: str) -> str:
    """Return what a parameter is called in the files, whatever was wrapped around its module."""
    return _WRAPPED.sub("", "." + name.removeprefix(_PEFT))[1:]


def replace_parameters(
    model: nn.Module, other: Callable[[nn.Parameter], nn.Parameter | None]
) -> None:
    """Put others in the place of parameters; what is tied stays tied.

    Args:
        model: Changed.
        other: Gives what a parameter becomes, or None to leave it.
    """
    made: dict[nn.Parameter, nn.Parameter | None] = {}
    for module in list(model.modules()):
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if old not in made:
                made[old] = other(old)
            if (new := made[old]) is not None:
                setattr(module, name, new)


class _Stretched(nn.Parameter):
    """A parameter of one number, stretched to a shape; its copies are as small."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stretched:
        if id(self) not in memo:
            memo[id(self)] = _stretched(self)
        found: _Stretched = memo[id(self)]
        return found


def _stretched(parameter: nn.Parameter) -> _Stretched:
    data = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
    return _Stretched(data, requires_grad=parameter.requires_grad)


def _empty(parameter: nn.Parameter) -> nn.Parameter | None:
    if not isinstance(parameter, _Stretched):
        return None
    data = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def emptied(model: Any) -> Any:
    """Put what is hollow of a model, possibly wrapped since, onto the meta device."""
    replace_parameters(model, _empty)
    return model
