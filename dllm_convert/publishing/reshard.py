"""Split weights into files of another size, streaming from file to file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dllm_convert.common.disk import read_chunks, writing
from dllm_convert.common.json_files import write_config
from dllm_convert.source.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    TensorEntry,
    encode_header,
    read_checkpoint,
)

WEIGHT_PATTERNS = ("model*.safetensors", INDEX_FILE)
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


@dataclass(frozen=True)
class _Piece:
    """One tensor and the file it comes from."""

    name: str
    file: str
    header: Header
    entry: TensorEntry

    @property
    def size(self) -> int:
        return self.entry.end - self.entry.start


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `5GB`, `500MB` (powers of 1000) or `1GiB` (of 1024).

    Raises:
        ValueError: It is not a positive size.
    """
    match = _SIZE.fullmatch(text)
    units = {unit.upper(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].upper() not in units:
        raise ValueError(f"{text!r} is not a size, expected something like 5GB, 500MB or 1GiB")
    size = int(float(match[1]) * units[match[2].upper()])
    if size < 1:
        raise ValueError(f"{text!r} is not a size above 0 bytes")
    return size


def needs_reshard(folder: Path, max_bytes: int) -> bool:
    """Whether a weight file of a checkpoint is larger than `max_bytes` and could be split."""
    headers = read_checkpoint(folder)
    return any(
        len(header.entries) > 1 and (folder / file).stat().st_size > max_bytes
        for file, header in headers.items()
    )


def reshard(source: Path, out: Path, max_bytes: int) -> list[str]:
    """Write the weights of a checkpoint anew in files of at most `max_bytes` of tensors.

    Tensors keep their order, types and bytes; one larger than the limit has a file of its own.
    Memory is bounded by 4 MiB whatever the size of a tensor.

    Args:
        source: Checkpoint folder.
        out: Folder to write into; must not be `source`.
        max_bytes: Bytes of tensors per file.

    Returns:
        Names of the files, the index included.

    Raises:
        DataError: The headers are broken, or there is no room.
    """
    headers = read_checkpoint(source)
    shards = _shards(headers, max_bytes)
    count = len(shards)
    names = (
        [SINGLE_FILE]
        if count == 1
        else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    )
    pieces = [piece for shard in shards for piece in shard]
    with writing(out, sum(piece.size for piece in pieces)):
        for name, shard in zip(names, shards, strict=True):
            _write(source, out / name, shard)
        if count == 1:
            return names
        index = {
            "metadata": {
                "total_parameters": sum(prod(piece.entry.shape) for piece in pieces),
                "total_size": sum(piece.size for piece in pieces),
            },
            "weight_map": {
                piece.name: name
                for name, shard in zip(names, shards, strict=True)
                for piece in shard
            },
        }
        write_config(out / INDEX_FILE, index)
    return [*names, INDEX_FILE]


def _shards(headers: Mapping[str, Header], max_bytes: int) -> list[list[_Piece]]:
    shards: list[list[_Piece]] = [[]]
    filled = 0
    for file in sorted(headers):
        header = headers[file]
        for name, entry in header.entries.items():
            piece = _Piece(name, file, header, entry)
            if shards[-1] and filled + piece.size > max_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(piece)
            filled += piece.size
    return shards


def _write(source: Path, target: Path, shard: list[_Piece]) -> None:
    metadata: Mapping[str, str] = shard[0].header.metadata if shard else {}
    header = {p.name: (p.entry.dtype, p.entry.shape, p.size) for p in shard}
    with target.open("wb") as out:
        out.write(encode_header(header, metadata))
        for piece in shard:
            start = piece.header.data_start + piece.entry.start
            with (source / piece.file).open("rb") as handle:
                for chunk in read_chunks(handle, start, piece.size):
                    out.write(chunk)
