"""Read a GGUF header: metadata and tensor descriptions, no weights.

The `gguf` package reads the same through memory maps of numpy scalars and needs two seconds for a
49,152-token vocabulary; a plan should not. The layout is ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dllm_convert.errors import DataError

_MAGIC = b"GGUF"
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4

GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
}
"""Type number to name, elements per block and bytes per block."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        kind: Name of its type.
        shape: Sizes, outermost first.
        start: Byte of the file at which it begins.
    """

    kind: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """The checked header of a GGUF file.

    Attributes:
        metadata: Key to value; arrays are lists.
        tensors: ggml name to tensor.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Reader:
    """Bounded reads: a count in a broken file never allocates more than the file holds."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self._handle = handle
        self._size = size

    def take(self, count: int) -> bytes:
        if count > self._size - self._handle.tell():
            raise ValueError(f"{count} bytes wanted at byte {self._handle.tell()} of {self._size}")
        return self._handle.read(count)

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def text(self) -> str:
        # Vendors have shipped token texts that are not UTF-8; they only have to stay distinct.
        return self.take(self.number("Q")).decode("utf-8", errors="backslashreplace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == _STRING:
                if count > self._size // 8:
                    raise ValueError(f"an array of {count} texts")
                return [self.text() for _ in range(count)]
            if inner in _SCALARS:
                return list(self.scalars(_SCALARS[inner], count))
            raise ValueError(f"an array of type {inner}")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        raise ValueError(f"value type {kind}")

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} with {dimensions} dimensions")
        shape = self.scalars("Q", dimensions)
        kind, offset = self.number("I"), self.number("Q")
        if kind not in GGML_TYPES:
            raise ValueError(f"tensor {name!r} of unknown type {kind}")
        return name, GGML_TYPES[kind][0], tuple(reversed(shape)), offset

    def aligned(self, alignment: int) -> int:
        return -(-self._handle.tell() // alignment) * alignment


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in the file."""
    _, elements, size = next(entry for entry in GGML_TYPES.values() if entry[0] == kind)
    total = 1
    for length in shape:
        total *= length
    return total // elements * size


def _parse(reader: _Reader, size: int) -> GgufHeader:
    if reader.take(4) != _MAGIC:
        raise ValueError("the file does not begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, where 2 and 3 are known")
    tensor_count, value_count = reader.number("Q"), reader.number("Q")
    if max(tensor_count, value_count) > size:
        raise ValueError(f"{tensor_count} tensors and {value_count} values")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    described = [reader.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment!r}")
    start = reader.aligned(alignment)
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in described:
        end = start + offset + tensor_bytes(kind, shape)
        if end > size:
            raise ValueError(f"tensor {name!r} ends at byte {end} of {size}, the file is truncated")
        if name in tensors:
            raise ValueError(f"tensor {name!r} twice")
        tensors[name] = GgufTensor(kind, shape, start + offset)
    return GgufHeader(metadata, tensors)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        DataError: The file cannot be read, is truncated or is not GGUF.
    """
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            return _parse(_Reader(handle, size), size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error) as error:
        raise DataError(
            f"{path.name}: found {str(error)[:300]}, expected a complete GGUF file",
            hint="Download the file again; files split in parts must be merged first",
        ) from error
