"""Model families, one file each; `model_type` is the key and nothing else is matched on."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from dllm_convert.adapters.base import Adapter, Window
from dllm_convert.errors import UnsupportedError

__all__ = ["Adapter", "Window", "all_adapters", "get_adapter"]


@cache
def _registry() -> dict[str, Adapter]:
    found: dict[str, Adapter] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        adapter = importlib.import_module(f"{__name__}.{module.name}").ADAPTER
        found[adapter.model_type] = adapter
    return found


def all_adapters() -> tuple[Adapter, ...]:
    """Return every family, sorted by `model_type`."""
    return tuple(adapter for _, adapter in sorted(_registry().items()))


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
        f"model_type {model_type!r} has no conversion{close}; "
        f"supported are {', '.join(sorted(registry))}",
        hint="See `dllm-convert architectures`",
    )
