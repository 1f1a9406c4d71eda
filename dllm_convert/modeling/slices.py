"""Parts of tensors, read from safetensors files without the rest of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from dllm_convert.source.safetensors_header import (
    TORCH_NAMES,
    Header,
    TensorEntry,
    read_checkpoint,
)

_PIECE = 1 << 24
"""Bytes that are read at once. A mapped file would count as memory of the process."""


class Slices:
    """The tensors of a checkpoint folder, of which any part can be read.

    Args:
        folder: Folder of safetensors.

    Raises:
        DataError: There are none, or a file is broken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, tuple[Header, TensorEntry]] = {
            name: (header, entry)
            for header in read_checkpoint(folder).values()
            for name, entry in header.entries.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a whole tensor."""
        return self._found[name][1].shape

    @torch.no_grad()
    def fill(self, name: str, target: torch.Tensor, first: Sequence[int] = ()) -> None:
        """Read a part of a tensor into another one, whose type and device it takes on.

        Args:
            name: Of the tensor in the files.
            target: Written to; its shape is the part's, with as many dimensions as the whole has.
            first: Where the part begins in each dimension; by default at the beginning.
        """
        header, entry = self._found[name]
        if not target.numel():
            return
        if not entry.shape:
            return self._rows(header, entry, (1,), target.view(1), (0,))
        return self._rows(header, entry, entry.shape, target, first or (0,) * len(entry.shape))

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a whole tensor on the CPU."""
        found = torch.empty(self.shape(name), dtype=dtype)
        self.fill(name, found)
        return found

    def _rows(
        self,
        header: Header,
        entry: TensorEntry,
        shape: tuple[int, ...],
        target: torch.Tensor,
        first: Sequence[int],
    ) -> None:
        stored: torch.dtype = getattr(torch, TORCH_NAMES[entry.dtype])
        row = prod(shape[1:])
        size = row * stored.itemsize
        step = max(1, min(len(target), _PIECE // max(size, 1)))
        piece = bytearray(step * size)
        inner = tuple(slice(at, at + n) for at, n in zip(first[1:], target.shape[1:], strict=True))
        with (self._folder / header.file).open("rb", buffering=0) as file:
            file.seek(header.data_start + entry.start + first[0] * size)
            for at in range(0, len(target), step):
                rows = min(step, len(target) - at)
                _read_all(file, memoryview(piece)[: rows * size])
                read = torch.frombuffer(piece, dtype=stored, count=rows * row)
                # (rows, ...) of the file, of which the target may hold a part of each.
                target[at : at + rows].copy_(read.view(rows, *shape[1:])[(slice(None), *inner)])


def _read_all(file: Any, into: memoryview) -> None:
    """Fill a buffer: a read may return less than there is."""
    at = 0
    while at < len(into):
        count = file.readinto(into[at:])
        if not count:
            raise EOFError(f"{file.name} ends before its last tensor")
        at += count
