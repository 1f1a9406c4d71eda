"""Declarations of third-party layouts, one module per project; the folder is scanned."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from dllm_convert.verification.foreign.layout import ForeignLayout


@cache
def all_layouts() -> tuple[ForeignLayout, ...]:
    """Return every declared layout, in the order in which they are tried."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return tuple(layout for module in modules for layout in module.LAYOUTS)
