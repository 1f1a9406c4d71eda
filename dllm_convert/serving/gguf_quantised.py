"""Fewer bits by llama.cpp's own quantiser, and what can be said of its work by reading it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.errors import DataError
from dllm_convert.serving.llama_cpp import quantise_file
from dllm_convert.source.gguf_header import GgufTensor, read_gguf_header, tensor_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

QUANTISED: Mapping[str, int] = {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
"""Mixtures of types that llama.cpp's quantiser makes, to the number that it has for each."""
_MOST = 0.5
"""Largest error of a row, relative to its length: of 4 bits it is about 0.1, of another row 1.4."""
_VALUES_AT_ONCE = 1 << 20
_THEIRS = frozenset({"general.file_type", "general.quantization_version"})


def quantise(lossless: Path, out: Path, outtype: str) -> int:
    """Have llama.cpp write a file with fewer bits, and read it back against the other.

    Args:
        lossless: The file to quantise, which was proven.
        out: The new file.
        outtype: A key of `QUANTISED`.

    Returns:
        Values that were compared.

    Raises:
        DataError: llama.cpp refuses, or a row is not near the one it was made of.
    """
    quantise_file(lossless, out, QUANTISED[outtype])
    old, new = read_gguf_header(lossless), read_gguf_header(out)
    for key, value in old.metadata.items():
        if key not in _THEIRS and new.metadata.get(key) != value:
            raise _differs(key, "is not what it was")
    if set(old.tensors) != set(new.tensors):
        raise _differs(sorted(set(old.tensors) ^ set(new.tensors))[0], "is in one of them only")
    compared = 0
    for name, tensor in old.tensors.items():
        found = new.tensors[name]
        if found.shape != tensor.shape:
            raise _differs(name, f"has shape {found.shape}, and had {tensor.shape}")
        width = tensor.shape[-1]
        count = prod(tensor.shape) // width
        step = max(1, _VALUES_AT_ONCE // width)
        for first in range(0, count, step):
            part = min(step, count - first)
            one = _rows(lossless, tensor, first, part)
            if _error(one, _rows(out, found, first, part)) > (0 if found.kind == "F32" else _MOST):
                raise _differs(name, "is not near what it was made of")
        compared += count * width
    return compared


def _rows(path: Path, tensor: GgufTensor, first: int, count: int) -> NDArray[np.float32]:
    """Return the numbers of some rows, (count, width)."""
    import gguf
    import numpy as np

    width = tensor.shape[-1]
    size = tensor_bytes(tensor.kind, (width,))
    with path.open("rb") as file:
        file.seek(tensor.start + first * size)
        raw = np.frombuffer(file.read(count * size), np.uint8).reshape(count, size)
    values: Any = gguf.dequantize(raw, gguf.GGMLQuantizationType[tensor.kind])
    rows: NDArray[np.float32] = values.reshape(count, width)
    return rows


def _error(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the largest error of a row, relative to its length."""
    import numpy as np

    length = np.linalg.norm(one, axis=1)
    error = np.linalg.norm(one - other, axis=1)
    worst = error / np.maximum(length, np.finfo(np.float32).tiny)
    return float(worst.max(initial=0.0)) if np.isfinite(worst).all() else float("inf")


def _differs(name: str, what: str) -> DataError:
    return DataError(
        f"llama.cpp's quantiser made another model: {name} {what}",
        hint="Take --outtype q8_0, which is written here",
    )
