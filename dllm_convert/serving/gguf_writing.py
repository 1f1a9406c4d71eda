"""Stream tensors of a conversion into a GGUF file, and read the file back against their source."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.copying import Advance, write_all
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning.layouts.gguf import Stored
from dllm_convert.serving.spans import entries_of
from dllm_convert.source.gguf_header import (
    GGML_TYPES,
    GgufHeader,
    read_gguf_header,
    tensor_bytes,
)
from dllm_convert.source.safetensors_header import DTYPE_BYTES, Header, TensorEntry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.float32]

OUTTYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""Types of matrices, as llama.cpp's converter calls them, to the number that a file has for it."""
AUTO = "auto"
_VALUES_AT_ONCE = 1 << 20
_BLOCK = {kind: elements for kind, elements, _ in GGML_TYPES.values()}


class Weights:
    """Rows of a conversion's tensors, read where they lie.

    Args:
        folder: The conversion.
        headers: Headers of its files.
        stack: Closes the files.
    """

    def __init__(self, folder: Path, headers: Mapping[str, Header], stack: ExitStack) -> None:
        self.entries = entries_of(headers)
        self._places = {}
        for file, header in headers.items():
            handle = stack.enter_context((folder / file).open("rb", buffering=0)).fileno()
            for name, entry in header.entries.items():
                self._places[name] = handle, header.data_start + entry.start

    def raw(self, name: str, first: int, count: int) -> bytes:
        """Return the bytes of rows as they are stored.

        Raises:
            DataError: The file ends early.
        """
        handle, start = self._places[name]
        size = _row_bytes(self.entries[name])
        data = os.pread(handle, count * size, start + first * size)
        if len(data) != count * size:
            raise DataError(f"{name} ended early: its file changed meanwhile")
        return data

    def rows(self, name: str, first: int, count: int) -> Rows:
        """Return rows as numbers, (count, width); a vector has rows of one number."""
        import numpy as np

        data, dtype = self.raw(name, first, count), self.entries[name].dtype
        if dtype == "BF16":  # the upper half of a float32
            wide = np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)
            return wide.view("<f4").reshape(count, -1)
        code = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
        return np.frombuffer(data, code).astype("<f4").reshape(count, -1)


def _row_bytes(entry: TensorEntry) -> int:
    return prod(entry.shape[1:]) * DTYPE_BYTES[entry.dtype]


def kind_of(stored: Stored, outtype: str, entries: Mapping[str, TensorEntry]) -> str:
    """Return the type that a tensor has in the file, as ggml calls it.

    The rule of llama.cpp's converter: vectors are float32; rows that Q8_0 cannot cut into blocks
    are float16.

    Args:
        stored: The tensor.
        outtype: What was asked for; `auto` is what the tensor has in the conversion.
        entries: Tensors of the conversion.
    """
    if stored.exact:
        return "F32"
    if outtype == AUTO:
        own = entries[str(stored.source)].dtype
        return own if own in ("F16", "BF16") else "F32"
    kind = outtype.upper()
    return kind if stored.shape[-1] % _BLOCK[kind] == 0 else "F16"


def file_type(kinds: Mapping[str, str], tensors: Sequence[Stored]) -> int:
    """Return the number that a file has for the type of most of its matrices."""
    sizes: dict[str, int] = {}
    for stored in tensors:
        if not stored.exact:
            kind = kinds[stored.name].lower()
            sizes[kind] = sizes.get(kind, 0) + prod(stored.shape)
    return OUTTYPES[max(sizes, key=lambda kind: sizes[kind])]


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Sequence[Stored],
    kinds: Mapping[str, str],
    weights: Weights,
    advance: Advance,
) -> None:
    """Write a file, some rows of a tensor at a time.

    Args:
        path: The file.
        architecture: Name of its graph.
        keys: Metadata.
        tensors: All tensors, in order.
        kinds: Type of each in the file.
        weights: The conversion.
        advance: Called with the bytes that were written.

    Raises:
        IncompatibleError: A number does not fit the type.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add(writer, key, value)
    for stored in tensors:
        kind = kinds[stored.name]
        writer.add_tensor_info(
            stored.name,
            stored.shape,
            np.dtype(np.float32),
            tensor_bytes(kind, stored.shape),
            raw_dtype=gguf.GGMLQuantizationType[kind],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab", buffering=0) as file:
        for stored in tensors:
            write_all(file.fileno(), bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            for data in _encoded(stored, kinds[stored.name], weights):
                write_all(file.fileno(), data)
                advance(len(data))
        write_all(file.fileno(), bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _add(writer: Any, key: str, value: Any) -> None:
    # A bool is an int to Python, and another type to the file.
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _encoded(stored: Stored, kind: str, weights: Weights) -> Iterator[bytes]:
    """Yield the bytes of a tensor in order."""
    if stored.source is None:
        yield struct.pack(f"<{prod(stored.shape)}f", *(stored.values or [0.0] * prod(stored.shape)))
        return
    dtype = weights.entries[stored.source].dtype
    for first, count in _parts(stored, weights):
        order = _in_pairs(stored, count) if stored.heads else None
        if kind == dtype and order is None:
            yield weights.raw(stored.source, first, count)
            continue
        rows = weights.rows(stored.source, first, count)
        yield encode(rows if order is None else rows[order], kind, stored.name)


def _parts(stored: Stored, weights: Weights) -> Iterator[tuple[int, int]]:
    """Yield first row and number of rows of parts that hold whole heads."""
    entry = weights.entries[str(stored.source)]
    count = entry.shape[0]
    whole = count // stored.heads if stored.heads else 1
    step = max(1, _VALUES_AT_ONCE // max(1, prod(entry.shape[1:]) * whole)) * whole
    for first in range(0, count, step):
        yield first, min(step, count - first)


def _in_pairs(stored: Stored, count: int) -> NDArray[np.intp]:
    """Return which row comes where: of a head's two halves (2, width / 2) by turns."""
    import numpy as np

    half = stored.shape[0] // stored.heads // 2
    return np.arange(count).reshape(-1, 2, half).swapaxes(1, 2).reshape(-1)


def encode(rows: Rows, kind: str, name: str) -> bytes:
    """Return rows (n, width) in a type of ggml.

    Raises:
        IncompatibleError: A number is not finite in it.
    """
    import gguf
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        made = gguf.quantize(rows, gguf.GGMLQuantizationType[kind])
        # The scale of a block of Q8_0 is a float16.
        largest = float(np.abs(rows).max(initial=0))
    if not np.isfinite(rows).all():
        raise IncompatibleError(f"{name} has numbers that are not finite")
    bound = {"F16": 65504.0, "Q8_0": 65504.0 * 127}.get(kind)
    if bound is not None and largest > bound:
        raise IncompatibleError(
            f"{name} has the number {largest:g}, more than {kind} can hold ({bound:g})",
            hint="Take --outtype bf16 or f32",
        )
    return bytes(np.ascontiguousarray(made).data)


def prove_gguf(
    path: Path,
    keys: Mapping[str, Any],
    tensors: Sequence[Stored],
    kinds: Mapping[str, str],
    weights: Weights,
) -> int:
    """Read a file back: every key is there, and every row is the source's, in its type.

    The rows of rotary heads are put back into the order of the conversion by an arithmetic of its
    own, so that a slip in the writer's does not prove itself.

    Returns:
        Bytes that were compared.

    Raises:
        DataError: Something differs; names the first.
    """
    header = read_gguf_header(path)
    _prove_keys(header, keys)
    wanted = {stored.name: stored for stored in tensors}
    if set(header.tensors) != set(wanted):
        odd = sorted(set(header.tensors) ^ set(wanted))[0]
        raise _differs(odd, "is in one of the file and its plan only")
    lost = set(weights.entries) - {stored.source for stored in tensors}
    if lost:
        raise _differs(sorted(lost)[0], "is in no tensor of the file")
    compared = 0
    with path.open("rb", buffering=0) as file:
        for name, stored in wanted.items():
            found, kind = header.tensors[name], kinds[name]
            if (found.kind, found.shape) != (kind, stored.shape):
                raise _differs(name, f"is {found.kind} {found.shape}")
            size = tensor_bytes(kind, stored.shape)
            if stored.source is None:
                data = os.pread(file.fileno(), size, found.start)
                values = stored.values or (0.0,) * prod(stored.shape)
                same = struct.unpack(f"<{len(data) // 4}f", data) == _single(values)
            else:
                same = _same_rows(file.fileno(), found.start, stored, kind, weights)
            if not same:
                raise _differs(name, "does not hold the rows of its source")
            compared += size
    return compared


def _single(values: Sequence[float]) -> tuple[float, ...]:
    return struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values))


def _same_rows(handle: int, start: int, stored: Stored, kind: str, weights: Weights) -> bool:
    """Whether each row of the source is where it has to be, in the type it has to have."""
    import numpy as np

    source = str(stored.source)
    total = weights.entries[source].shape[0]
    size = tensor_bytes(kind, stored.shape) // total
    width = total // stored.heads if stored.heads else 0
    for first, count in _parts(stored, weights):
        data = np.frombuffer(os.pread(handle, count * size, start + first * size), np.uint8)
        if len(data) != count * size:
            return False
        rows = weights.rows(source, first, count)
        expected = np.frombuffer(encode(rows, kind, stored.name), np.uint8).reshape(count, size)
        place = np.arange(count)
        if width:
            head, inside = place // width, place % width
            half, pair = inside // (width // 2), inside % (width // 2)
            place = head * width + 2 * pair + half
        if not np.array_equal(data.reshape(count, size)[place], expected):
            return False
    return True


def holds(header: GgufHeader, key: str, value: Any) -> bool:
    """Whether a file has a value under a key, numbers as float32 has them."""
    found, expected = header.metadata.get(key), value
    if isinstance(value, float):
        expected = _single((value,))[0]
    elif isinstance(value, list) and value and isinstance(value[0], float):
        expected = list(_single(value))
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def _prove_keys(header: GgufHeader, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        # The writer leaves empty ones out.
        if (value or not isinstance(value, str | list)) and not holds(header, key, value):
            raise _differs(key, "is not what was to be written")


def _differs(name: str, what: str) -> DataError:
    return DataError(
        f"the export is not its source: {name} {what}",
        hint="Export it again; if that says the same, the disk or this program is at fault",
    )
