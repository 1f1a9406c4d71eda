"""The mean of an embedding's used rows, streamed; what a new mask token starts from."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from dllm_convert.common.copying import pieces
from dllm_convert.errors import IncompatibleError
from dllm_convert.source.safetensors_header import DTYPE_BYTES, Header, TensorEntry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_ROWS_AT_ONCE_BYTES = 1 << 18
"""Of a core's cache, with what is computed from them; 1 MiB took three times as long."""


def _sum_bfloat16(data: bytes, width: int) -> Floats:
    """Add rows of bfloat16, which numpy does not know: the upper half of a float32's bits.

    Two neighbours lie in one 32-bit word, so that both are had without copying single halves.
    """
    import numpy as np

    if width % 2:
        halves = np.frombuffer(data, "<u2").reshape(-1, width)
        values = (halves.astype(np.uint32) << 16).view(np.float32)
        odd: Floats = values.sum(0, dtype=np.float64)
        return odd
    words = np.frombuffer(data, "<u4").reshape(-1, width // 2)
    total = np.empty(width)
    total[0::2] = (words << 16).view(np.float32).sum(0, dtype=np.float64)
    total[1::2] = (words & np.uint32(0xFFFF0000)).view(np.float32).sum(0, dtype=np.float64)
    return total


def _sum_as(code: str) -> Callable[[bytes, int], Floats]:
    def add(data: bytes, width: int) -> Floats:
        import numpy as np

        total: Floats = np.frombuffer(data, code).reshape(-1, width).sum(0, dtype=np.float64)
        return total

    return add


_SUMS = {
    "F64": _sum_as("<f8"),
    "F32": _sum_as("<f4"),
    "F16": _sum_as("<f2"),
    "BF16": _sum_bfloat16,
}


def _encode(mean: Floats, dtype: str) -> bytes:
    """Return numbers as bytes of `dtype`, rounded to the nearest, ties to even, as torch does.

    Like torch's, the way from 64 to 16 bits leads over 32.
    """
    import numpy as np

    if dtype == "F64":
        return mean.astype("<f8").tobytes()
    single: Any = mean.astype(np.float32)
    if dtype == "F32":
        return bytes(single.astype("<f4").tobytes())
    if dtype == "F16":
        return bytes(single.astype("<f2").tobytes())
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return bytes(rounded.astype("<u2").tobytes())


def is_finite(row: bytes, dtype: str) -> bool:
    """Whether a row of `dtype` has no NaN and no infinity."""
    import numpy as np

    with np.errstate(all="ignore"):
        return bool(np.isfinite(_SUMS[dtype](row, len(row) // DTYPE_BYTES[dtype])).all())


def mean_row(handle: int, header: Header, entry: TensorEntry, used_rows: int) -> bytes:
    """Return the mean of the first `used_rows` rows as bytes of the tensor's own dtype.

    Args:
        handle: The file, open for reading.
        header: Its header.
        entry: The tensor, shape (rows, ...).
        used_rows: How many rows to average, at least 1.

    Raises:
        IncompatibleError: The type is not a floating-point one, or a value is not finite.
    """
    import numpy as np

    if entry.dtype not in _SUMS:
        raise IncompatibleError(
            f"{header.file}: vocabulary tensors have dtype {entry.dtype}, "
            f"expected one of {', '.join(_SUMS)}"
        )
    width = prod(entry.shape[1:])
    row_bytes = width * DTYPE_BYTES[entry.dtype]
    start = header.data_start + entry.start
    total, add = np.zeros(width), _SUMS[entry.dtype]
    per_read = max(1, _ROWS_AT_ONCE_BYTES // max(1, row_bytes))
    with np.errstate(all="ignore"):
        for first in range(0, used_rows, per_read):
            count = min(per_read, used_rows - first) * row_bytes
            parts = [bytes(piece) for piece, _ in pieces(handle, start + first * row_bytes, count)]
            total += add(b"".join(parts), width)
        row = _encode(total / used_rows, entry.dtype)
    if not (np.isfinite(total).all() and is_finite(row, entry.dtype)):
        raise IncompatibleError(f"{header.file}: the embedding has values that are not finite")
    return row
