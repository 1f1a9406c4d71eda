"""How many bytes a conversion writes, from headers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from dllm_convert.planning.mask_token import MaskTokenDecision
from dllm_convert.source.info import SourceInfo, TensorInfo
from dllm_convert.source.safetensors_header import DTYPE_BYTES


@dataclass(frozen=True)
class Writes:
    """Bytes of weights that the untrained conversion takes; training changes all it trains.

    Attributes:
        total: Bytes of all tensors of the output.
        changed: Tensor name to its bytes in the output, of those whose content differs.
        files_changed: Files that hold one of them, as bytes of the whole file.
    """

    total: int
    changed: dict[str, int]
    files_changed: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "weights_bytes": self.total,
            "changed_bytes": sum(self.changed.values()),
            "changed_tensors": dict(self.changed),
            "unchanged_bytes": self.total - sum(self.changed.values()),
            "files_changed": dict(self.files_changed),
        }


def _element_bytes(source: SourceInfo) -> int | None:
    """Bytes of a weight of a dequantised GGUF file; None where tensors keep their own type."""
    if source.kind != "gguf":
        return None
    matrices = {tensor.dtype for tensor in source.tensors.values() if len(tensor.shape) > 1}
    return 2 if matrices <= {"F16", "BF16"} else 4


def count_writes(
    source: SourceInfo,
    mask: MaskTokenDecision,
    *,
    changed: Iterable[str],
    rewritten: Collection[str] = (),
) -> Writes:
    """Count the bytes of the output's tensors.

    Args:
        source: The checkpoint; without headers everything is 0.
        mask: Says how many rows the vocabulary's tensors get.
        changed: Names of tensors whose content differs.
        rewritten: Files whose other tensors are left out or get other names.
    """
    names = set(changed)
    element = _element_bytes(source)
    grown = mask.rows_after != mask.rows_before

    def size(name: str, tensor: TensorInfo) -> int:
        rows = mask.rows_after if grown and name in names else tensor.shape[0]
        width = element if element is not None else DTYPE_BYTES[tensor.dtype]
        return tensor.size // max(tensor.shape[0], 1) * rows * width

    sizes = {
        name: size(name, tensor) if tensor.shape else DTYPE_BYTES.get(tensor.dtype, 4)
        for name, tensor in source.tensors.items()
    }
    touched = {source.tensors[name].file for name in names if name in source.tensors}
    touched |= set(rewritten)
    files = dict.fromkeys(sorted(touched), 0)
    for name, count in sizes.items():
        file = source.tensors[name].file
        if file in files:
            files[file] += count
    return Writes(sum(sizes.values()), {n: c for n, c in sizes.items() if n in names}, files)
