"""Read tensors by their place in a file, so that the file may be larger than memory.

The reader of safetensors maps a whole file privately, and Linux refuses that for a file larger than
all its memory (measured: `Cannot allocate memory` for 6 TiB, sparse).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dllm_convert.errors import DataError
from dllm_convert.source.safetensors_header import TORCH_NAMES, Header

_TYPES = {dtype: getattr(torch, name) for dtype, name in TORCH_NAMES.items()}


def read_rows(
    folder: Path, header: Header, name: str, *, at_once: int | None = None
) -> Iterator[torch.Tensor]:
    """Read a tensor in pieces of its first dimension.

    Args:
        folder: Folder of the file.
        header: Header of the file that holds it.
        name: Its name.
        at_once: Rows per piece; None for all in one, shape and all.

    Raises:
        DataError: The file ends early, or the type is none that torch has.
    """
    entry = header.entries[name]
    if entry.dtype not in _TYPES:
        raise DataError(f"{header.file}: tensor {name} is {entry.dtype}, which torch cannot read")
    rows = entry.shape[0] if entry.shape else 1
    step = rows if at_once is None else at_once
    row_bytes = (entry.end - entry.start) // max(rows, 1)
    with (folder / header.file).open("rb") as file:
        file.seek(header.data_start + entry.start)
        for first in range(0, max(rows, 1), max(step, 1)):
            count = min(step, rows - first)
            shape = (count, *entry.shape[1:]) if entry.shape else ()
            buffer = bytearray(count * row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise DataError(f"{header.file}: ended inside tensor {name}")
            empty = torch.empty(0, dtype=_TYPES[entry.dtype])
            piece = torch.frombuffer(buffer, dtype=_TYPES[entry.dtype]) if buffer else empty
            yield piece.view(shape)


def read_tensor(folder: Path, header: Header, name: str) -> torch.Tensor:
    """Read a whole tensor; arguments and errors are those of `read_rows`."""
    return next(read_rows(folder, header, name))
