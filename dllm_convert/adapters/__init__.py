"""Model families, one file each; `model_type` is the key and nothing else is matched on."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from dllm_convert.adapters.base import Adapter, Measured, SlidingWindow
from dllm_convert.adapters.measured import RECORD, adapter_from_dict
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import UnsupportedError

__all__ = [
    "Adapter",
    "Measured",
    "SlidingWindow",
    "adapter_of",
    "all_adapters",
    "get_adapter",
    "has_adapter",
]

_NOT_FAMILIES = ("base", "measured", "tensors")


@cache
def _registry() -> dict[str, Adapter]:
    found: dict[str, Adapter] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name in _NOT_FAMILIES:
            continue
        adapter = importlib.import_module(f"{__name__}.{module.name}").ADAPTER
        found[adapter.model_type] = adapter
    return found


def all_adapters() -> tuple[Adapter, ...]:
    """Return every family, sorted by `model_type`."""
    return tuple(adapter for _, adapter in sorted(_registry().items()))


def has_adapter(model_type: str) -> bool:
    """Whether a file declares the family."""
    return model_type in _registry()


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """Return the family of a converted checkpoint, declared here or recorded in its config.json.

    Raises:
        UnsupportedError: There is no such family, and no record.
        IncompatibleError: The record is broken.
    """
    section = diffusion_section(config)
    recorded = None if section is None else section.get(RECORD)
    return (
        get_adapter(str(config.get("model_type")))
        if recorded is None
        else adapter_from_dict(recorded)
    )


def get_adapter(model_type: str) -> Adapter:
    """Return the family of a config's `model_type`.

    Raises:
        UnsupportedError: There is no such family; the message lists those there are.
    """
    registry = _registry()
    if model_type in registry:
        return registry[model_type]
    nearest = difflib.get_close_matches(model_type, registry, n=1)
    close = f", the nearest is {nearest[0]!r}" if nearest else ""
    raise UnsupportedError(
        f"model_type {model_type!r} has no adapter{close}; "
        f"adapters exist for {', '.join(sorted(registry))}",
        hint="`dllm-convert check SOURCE --probe` measures on a small random instance whether it "
        "can be converted, `run --allow-generic` then does",
    )
