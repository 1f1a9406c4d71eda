"""Whether weights, config and the installed transformers fit together, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any, TypeGuard

from packaging.version import Version

from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import IncompatibleError
from dllm_convert.source_info import TensorInfo

_OTHER_HEADS = re.compile(
    r".*(For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)"
    r"|Reward\w*|ForTextRegression)"
)
_SHAPES = {
    **dict.fromkeys(("q_proj", "query"), ("queries", "hidden_size")),
    **dict.fromkeys(("k_proj", "v_proj", "key", "value"), ("keys", "hidden_size")),
    "o_proj": ("hidden_size", "queries"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("intermediate_size", "hidden_size")),
    "down_proj": ("hidden_size", "intermediate_size"),
}
"""Outputs and inputs of a layer's matrices, by the last part of the module's name."""


def check_transformers(needed: str) -> None:
    """Check that the installed transformers honours what the conversion relies on.

    Raises:
        IncompatibleError: It is older: it would load the result causal, without a warning.
    """
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return
    if Version(found) < Version(needed):
        raise IncompatibleError(
            f"transformers {found} is installed, which would load the result with causal attention "
            f"and no warning, expected at least {needed}",
            hint=f"pip install 'transformers>={needed}'",
        )


def diffusion_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a conversion wrote into config.json, None if the model is no conversion."""
    section = config.get("diffusion")
    return section if isinstance(section, Mapping) else None


def check_converted(config: Mapping[str, Any], *, mask_id: int, token_shift: bool) -> str | None:
    """Check that a source that was converted before goes on as it was; return what to know of it.

    Args:
        config: config.json of the source.
        mask_id: The mask token of this conversion.
        token_shift: Whether it reads predictions one position earlier.

    Raises:
        IncompatibleError: It masks with another token, or reads predictions at another position.
    """
    section = diffusion_section(config)
    if section is None:
        return None
    shift, mask = section.get("token_shift"), section.get("mask_token_id")
    if shift is not None and shift is not token_shift:
        was, flag = ("with", "keep") if shift else ("without", "drop")
        raise IncompatibleError(
            f"the source is a diffusion model that was trained {was} the token shift: read "
            "otherwise, each of its predictions would be for the wrong position",
            hint=f"--set token_shift={flag}",
        )
    if mask is not None and mask != mask_id:
        raise IncompatibleError(
            f"the source is a diffusion model whose mask token is {mask}, and this would mask with "
            f"{mask_id}, which it never saw",
            hint=f"--set mask_token.id={mask}",
        )
    blocks = f" in blocks of {section['block_size']}" if section.get("block_size") else ""
    return (
        f"the source is a diffusion model already ({section.get('objective')}{blocks}): training "
        "goes on from it, and the autoregressive NLL of the base is that of this model under a "
        "causal mask"
    )


def check_class(config: Mapping[str, Any], adapter: Adapter) -> None:
    """Check that the checkpoint is of a language model, not of another head on the same body.

    Raises:
        IncompatibleError: It was trained to classify or to score.
    """
    listed = config.get("architectures")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if adapter.stock_class in names:
        return
    for name in names:
        if _OTHER_HEADS.fullmatch(name):
            raise IncompatibleError(
                f"config.json: architectures names {name}, expected {adapter.stock_class}: a model "
                "that was trained for another task does not write text",
                hint="Take the language model it was made from",
            )


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the widths that the config gives, `queries` and `keys` computed from the heads."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    sizes = {name: config[name] for name in names if _is_size(config.get(name))}
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    if heads is None or hidden is None:
        return sizes
    head = config.get("head_dim")
    width = head if _is_size(head) else hidden // heads
    groups = config.get("num_key_value_heads")
    sizes["queries"] = heads * width
    sizes["keys"] = (groups if _is_size(groups) else heads) * width
    return sizes


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_shapes(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], adapter: Adapter
) -> None:
    """Check that embedding and layers have the sizes that the config gives.

    Raises:
        IncompatibleError: One has others: transformers would fail, or fill it at random.
    """
    sizes = _sizes(config)
    hidden = sizes.get("hidden_size")
    width = tensors[adapter.embedding].shape[-1]
    if hidden is not None and width != hidden:
        raise IncompatibleError(
            f"{adapter.embedding} is {width} wide, config.json says hidden_size {hidden}",
            hint="Take the config.json that belongs to these weights",
        )
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        wanted = _SHAPES.get(module.rpartition(".")[2])
        if wanted is None or kind != "weight" or not all(size in sizes for size in wanted):
            continue
        expected = tuple(sizes[size] for size in wanted)
        if tensor.shape != expected:
            raise IncompatibleError(
                f"{name} has shape {tensor.shape}, config.json makes it {expected} "
                f"({' x '.join(wanted)})",
                hint="Take the config.json that belongs to these weights",
            )
