"""Fit a checkpoint's tensors to their class, from headers alone.

The class is known here by its declaration (`adapters/tensors.py`), which a test compares with the
class itself, so that a plan needs no torch. Names, shapes and types are all compared: whatever a
class does not find it fills at random, and whatever it does not know it drops, with a warning at
most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import IncompatibleError
from dllm_convert.source.class_fit import ClassFit
from dllm_convert.source.fit import Fit, Same, decide_tie, declared_dtype, stock
from dllm_convert.source.info import TensorInfo
from dllm_convert.source.tensor_names import leftovers


def fit_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    adapter: Adapter,
    *,
    same: Same,
    typed: bool = True,
    beside: Collection[str] = (),
) -> Fit:
    """Compare a checkpoint's tensors with its class.

    Args:
        config: config.json, its numbers checked.
        tensors: Tensor name to description, of all files.
        adapter: The family.
        same: Compares bytes.
        typed: Whether the types are those of the weights; a GGUF file's are not.
        beside: Names of the files that lie where the weights do; they tell what a body is for.

    Raises:
        IncompatibleError: Tensors are missing, of another shape or type, or belong to a computation
            that the class does not do.
    """
    if adapter.tensors is None:
        return _measured_fit(config, tensors, adapter, same)
    found = ClassFit(config, tensors, adapter, adapter.tensors, same)
    return found.fit(typed=typed, beside=beside)


def _measured_fit(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], adapter: Adapter, same: Same
) -> Fit:
    """Fit a family that was measured: the measurement compared names, shapes and types."""
    dropped = leftovers(tensors, adapter)
    names = {name: name for name in tensors if name not in dropped}
    if adapter.embedding not in names:
        raise IncompatibleError(
            f"the weights have no {adapter.embedding}, expected {stock(adapter)}"
        )
    tied, correction, notes = decide_tie(config, names, adapter, same)
    if adapter.head not in names and not tied:
        raise IncompatibleError(
            f"the weights have no {adapter.head}: their language-model head would be random",
            hint=f"Take {stock(adapter)}",
        )
    present = [n for n in (adapter.embedding, adapter.head, *adapter.head_biases) if n in names]
    rows = tensors[adapter.embedding].shape[:1]
    for name in present:
        if tensors[name].shape[:1] != rows:
            raise IncompatibleError(
                f"{name} has shape {tensors[name].shape}, expected {rows} rows as the embedding"
            )
    twins = frozenset({adapter.head} & names.keys()) if tied else frozenset()
    kept = {name: tensors[name] for name in names}
    correction |= declared_dtype(config, kept)
    return Fit(names, dropped, correction, notes, (), twins, tuple(present))
