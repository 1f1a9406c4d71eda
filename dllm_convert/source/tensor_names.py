"""Names of tensors: which one a class loads each tensor of a file under, and which it ignores."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.tensors import ClassTensors

LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in files older than transformers 4, renamed by every loader."""


def stored_names(folder_tensors: Iterable[str], adapter: Adapter) -> dict[str, str]:
    """Return the name under which the class loads each tensor, of whatever a folder holds.

    Nothing is checked, so this serves folders that are to be verified.
    """
    names = list(folder_tensors)
    if adapter.tensors is None:
        return {name: name for name in names}
    known = every_name(adapter.tensors, names)
    return {name: loaded_as(name, known, adapter.tensors.prefix) for name in names}


def leftovers(names: Iterable[str], adapter: Adapter) -> tuple[str, ...]:
    """Return the tensors that the stock class does not load, such as a pooler."""
    names = list(names)
    if adapter.tensors is None:
        if adapter.unused_tensors is None:
            return ()
        return tuple(name for name in names if re.fullmatch(adapter.unused_tensors, name))
    known = every_name(adapter.tensors, names)
    loaded = {name: loaded_as(name, known, adapter.tensors.prefix) for name in names}
    return tuple(name for name, new in loaded.items() if new not in known)


def every_name(declared: ClassTensors, names: Iterable[str]) -> set[str]:
    """Return all names a class could have, for as many layers as the files name."""
    numbers = [int(n) for name in names if (n := _layer_number(name, declared)) is not None]
    flags = dict.fromkeys(declared.flagged, True)
    # A number without layers below it is no reason to build names for all of them.
    return set(declared.names(min(max(numbers, default=-1), len(numbers)) + 1, flags))


def _layer_number(name: str, declared: ClassTensors) -> str | None:
    bare = declared.layers.removeprefix(f"{declared.prefix}.")
    found = re.match(rf"(?:{re.escape(declared.prefix)}\.)?{re.escape(bare)}(\d{{1,6}})\.", name)
    return found[1] if found else None


def loaded_as(name: str, known: Collection[str], prefix: str) -> str:
    """Return what transformers makes of a name: old spellings, and the body's name left out."""
    if name in known:
        return name
    for old, new in LEGACY_NAMES.items():
        name = name.replace(old, new)
    if name in known:
        return name
    if f"{prefix}.{name}" in known:
        return f"{prefix}.{name}"
    bare = name.removeprefix(f"{prefix}.")
    return bare if bare in known else name
