"""Tensors as bytes of files: where they lie, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dllm_convert.adapters import Adapter
from dllm_convert.common.copying import pieces
from dllm_convert.source.safetensors_header import DTYPE_BYTES, TensorEntry, read_checkpoint
from dllm_convert.source.tensor_names import stored_names


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies.

    Attributes:
        path: Its file.
        start: First byte in the file.
        entry: Its type and shape.
    """

    path: Path
    start: int
    entry: TensorEntry

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.entry.shape[1:]) * DTYPE_BYTES[self.entry.dtype]


def locate(
    folder: Path, adapter: Adapter, names: Mapping[str, str] | None = None
) -> dict[str, Placed]:
    """Return name in the class to place of the tensors of a folder.

    Args:
        folder: The folder.
        adapter: Its family.
        names: Name in the files to name in the class, of those that are wanted; all by default.
    """
    headers = read_checkpoint(folder)
    if names is None:
        names = stored_names((n for header in headers.values() for n in header.entries), adapter)
    return {
        names[name]: Placed(folder / file, header.data_start + entry.start, entry)
        for file, header in headers.items()
        for name, entry in header.entries.items()
        if name in names
    }


def first_difference(ours: Placed, base: Placed, start: int, length: int) -> int | None:
    """Return the first byte of a part of two tensors that differs, None if all are equal."""
    position = start
    with ours.path.open("rb", 0) as left, base.path.open("rb", 0) as right:
        for piece, _ in pieces(left.fileno(), ours.start + start, length):
            # Holes of two files need not lie alike, so the pieces of the other are put together.
            parts = pieces(right.fileno(), base.start + position, len(piece))
            mine, other = bytes(piece), b"".join(bytes(part) for part, _ in parts)
            if mine != other:  # bytes are compared at once, views one element after the other
                pairs = enumerate(zip(mine, other, strict=True))
                return position + next(at for at, (one, two) in pairs if one != two)
            position += len(piece)
    return None
