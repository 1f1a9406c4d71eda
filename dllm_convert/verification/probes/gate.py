"""Whose code a checkpoint brings: this package's own, byte for byte, or somebody else's.

A folder's modelling files are a program. Only one that this very version writes runs unasked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.adapters import Adapter
from dllm_convert.modeling.bundle import MODELING_FILE, auto_map, published_code

FLAG = "--trust-remote-code"
_PROGRAMS = ("custom_generate", "adapter_config.json")
"""What else makes transformers run code when it loads a folder that is trusted."""


def strange_code(folder: Path, config: Mapping[str, Any], adapter: Adapter) -> str | None:
    """Return why the folder's code is not this package's, None if it is, or if there is none.

    Args:
        folder: The checkpoint.
        config: Its config.json.
        adapter: Its family.
    """
    if config.get("auto_map") != auto_map(adapter):
        return f"config.json names other code than {MODELING_FILE} (auto_map)"
    strange = [name for name in _PROGRAMS if (folder / name).exists()]
    if strange:
        return f"the folder has {strange[0]}, which no conversion writes"
    for name, text in published_code(adapter).items():
        path = folder / name
        if path.is_file() and path.read_bytes() != text.encode():
            return f"{name} is not the file that this version of dllm-convert writes"
    return None
