"""Read and check safetensors headers and shard indexes; no weight is loaded.

The format: 8 bytes little-endian header length, a JSON header, then the data. Everything here is
read from files somebody else wrote, so every number is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from dllm_convert.common.json_files import (
    DOWNLOAD_AGAIN,
    LFS_POINTER,
    DuplicateKeyError,
    broken,
    is_pointer,
    pointer,
    unique,
)
from dllm_convert.common.json_files import load_json as load_json
from dllm_convert.common.json_files import load_json_object as load_json_object
from dllm_convert.errors import DataError
from dllm_convert.source.wrong_source import no_weights

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

TORCH_NAMES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16"},
    **{"U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "C64": "complex64"},
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
"""Types of a header by the names that torch, and config.json, have for them."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that weights are computed with as they are stored."""

_SHORTEST_TENSOR = len('"":{"dtype":"I8","shape":[],"data_offsets":[0,0]},')
_MAX_DIMENSIONS = 64
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header.

    Attributes:
        dtype: Name of the element type.
        shape: Sizes, outermost first.
        start: First byte, counted from the end of the header.
        end: One past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The checked header of one file.

    Attributes:
        file: Name of the file inside its folder.
        data_start: Byte of the file at which the data begin.
        entries: Tensor name to entry, in file order.
        metadata: The `__metadata__` of the file.
    """

    file: str
    data_start: int
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(file: str, name: str, raw: Any, data_bytes: int) -> TensorEntry:
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        raise broken(file, f"tensor {name!r} is described by {raw!r}", "dtype, shape, data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise broken(
            file, f"tensor {name!r} has dtype {dtype!r}", f"one of {', '.join(DTYPE_BYTES)}"
        )
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        raise broken(file, f"tensor {name!r} has shape {shape!r}", "a list of whole numbers")
    if len(shape) > _MAX_DIMENSIONS:
        raise broken(file, f"tensor {name!r} has {len(shape)} sizes", f"at most {_MAX_DIMENSIONS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise broken(file, f"tensor {name!r} has offsets {offsets!r}", "two whole numbers")
    start, end = offsets
    if not start <= end <= data_bytes:
        raise broken(
            file,
            f"tensor {name!r} lies at bytes {start}..{end}" + f" of {data_bytes} (the file is "
            "truncated or its header is corrupt)",
            "bytes inside the file",
        )
    needed = prod(shape) * DTYPE_BYTES[dtype]
    if end - start != needed:
        raise broken(
            file,
            f"tensor {name!r} has {end - start} bytes",
            f"{needed} for {dtype} of shape {tuple(shape)}",
        )
    return TensorEntry(dtype, tuple(shape), start, end)


def parse_header(raw: bytes, *, file: str, file_bytes: int) -> Header:
    """Check the JSON part of a header.

    Args:
        raw: The JSON, without the 8 length bytes.
        file: Name of the file, for messages.
        file_bytes: Size of the whole file.

    Raises:
        DataError: The header is not what the format allows.
    """
    # Brackets are what makes a parser allocate: more of them than tensors need are no header.
    if raw.count(b"{") + raw.count(b"[") > 16 + 4 * (len(raw) // _SHORTEST_TENSOR):
        raise broken(file, "the header is not valid JSON", "a safetensors header")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        "".join(content).encode("utf-8")
    except DuplicateKeyError as error:
        raise broken(file, f"the header names {error} twice", "every name once") from error
    except (ValueError, RecursionError) as error:
        raise broken(file, "the header is not valid JSON", "a safetensors header") from error
    if not isinstance(content, dict):
        raise broken(file, "the header is not an object", "a safetensors header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken(file, "__metadata__ is not text to text", "a mapping of strings")
    data_start = 8 + len(raw)
    data_bytes = file_bytes - data_start
    entries = {name: _entry(file, name, value, data_bytes) for name, value in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for name, entry in entries.items():
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole"
            raise broken(file, f"tensor {name!r} {what} at byte {entry.start}", f"byte {position}")
        position = entry.end
    if position != data_bytes:
        raise broken(file, f"{data_bytes} bytes of data", f"{position} from the header")
    return Header(file, data_start, entries, metadata)


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return length and JSON of a header for tensors that follow one another without gaps.

    Args:
        tensors: Name to type, shape and bytes, in file order.
        metadata: The `__metadata__`; transformers refuses a file that does not name its format.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, (dtype, shape, size) in tensors.items():
        offsets = [position, position + size]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += size
    raw = json.dumps(content, separators=(",", ":")).encode()
    # The reference implementation aligns the data to 8 bytes with spaces.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        DataError: The file is truncated, corrupt or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length_bytes = handle.read(8)
            if len(length_bytes) < 8:
                raise broken(path.name, f"{size} bytes", "at least 8, a safetensors file")
            if length_bytes == LFS_POINTER[:8] and is_pointer(path):
                raise pointer(path.name)
            length = int.from_bytes(length_bytes, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise broken(
                    path.name,
                    f"a header of {length} bytes in a file of {size} (truncated or foreign)",
                    f"at most {min(MAX_HEADER_BYTES, size - 8)}",
                )
            raw = handle.read(length)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from error
    return parse_header(raw, file=path.name, file_bytes=size)


def read_weight_map(index: Path, *, suffix: str = ".safetensors") -> dict[str, str]:
    """Read the tensor-to-file mapping of an index, with file names checked.

    Args:
        index: The file.
        suffix: How the name of every file has to end: one that is named like a config or like
            code would be overwritten by it in the output.

    Raises:
        DataError: The index is broken or points outside its folder.
    """
    weight_map = load_json_object(index, distinct=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken(index.name, "no weight_map", "a mapping from tensor to file")
    for name, file in weight_map.items():
        found = f"{name!r} is in file {file!r}"
        if not isinstance(file, str) or "\\" in file or not file.isprintable():
            raise broken(index.name, found, "a file name")
        if PurePosixPath(file).name != file:
            raise broken(index.name, f"{found}, outside the folder", "a plain file name")
        if not file.endswith(suffix) or len(file.encode()) > _MAX_NAME_BYTES:
            raise broken(index.name, found, f"a file name that ends in {suffix}")
    return weight_map


def _check_against_index(weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    for name, file in weight_map.items():
        if name not in headers[file].entries:
            raise broken(
                file, f"tensor {name!r} of {INDEX_FILE} is not in it", "every indexed tensor"
            )
    for file, header in headers.items():
        for name in header.entries:
            if weight_map.get(name) != file:
                raise broken(
                    file,
                    f"holds tensor {name!r}, which {INDEX_FILE} does not place there",
                    "no other",
                )


def read_checkpoint(folder: Path) -> dict[str, Header]:
    """Read all headers of a checkpoint folder, file name to header.

    `model.safetensors` wins over an index, as it does in transformers.

    Raises:
        DataError: There are no safetensors weights, a shard is missing, or a file is broken.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return {SINGLE_FILE: read_header(single)}
    if not index.is_file():
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        raise no_weights(str(folder), names)
    weight_map = read_weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise DataError(
            f"{INDEX_FILE} names {len(files)} shards, {len(missing)} of them missing: "
            f"{', '.join(missing[:3])}",
            hint=DOWNLOAD_AGAIN,
        )
    headers = {file: read_header(folder / file) for file in files}
    _check_against_index(weight_map, headers)
    return headers
