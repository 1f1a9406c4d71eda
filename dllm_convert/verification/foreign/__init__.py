"""Checkpoints that other projects wrote: recognised from config.json, read without their code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.verification.foreign.layout import ForeignLayout
from dllm_convert.verification.foreign.layouts import all_layouts

__all__ = ["ForeignLayout", "all_layouts", "find_layout"]


def find_layout(config: Mapping[str, Any]) -> ForeignLayout | None:
    """Return the layout of a config.json, None if it is none that is known."""
    return next((layout for layout in all_layouts() if layout.matches(config)), None)
