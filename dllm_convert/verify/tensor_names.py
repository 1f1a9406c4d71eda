"""Names of tensors: what a loader makes of those in old files."""

from __future__ import annotations

# Names in files older than transformers 4, renamed by every loader.
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def modern_name(name: str) -> str:
    """Return the name under which transformers loads a tensor."""
    for old, new in _LEGACY.items():
        name = name.replace(old, new)
    return name
