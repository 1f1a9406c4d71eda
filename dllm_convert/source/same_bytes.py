"""Whether two tensors of a folder hold the same bytes, read piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dllm_convert.errors import DataError
from dllm_convert.source.safetensors_header import TensorEntry, read_checkpoint

if TYPE_CHECKING:
    from dllm_convert.source.fit import Same

_PIECE = 1 << 20


def unknown(first: str, second: str) -> None:
    """Say that the bytes are not at hand: on the Hub, in a pickle, in a GGUF file."""
    return


def comparer(folder: Path | None) -> Same:
    """Return what compares two tensors of a folder of safetensors by their names.

    Two that differ are told apart at the first piece as a rule; two that are equal are read whole.

    Args:
        folder: The folder, None where there is none at hand.
    """
    if folder is None:
        return unknown

    def same(first: str, second: str) -> bool:
        places: dict[str, tuple[Path, int, TensorEntry]] = {}
        for file, header in read_checkpoint(folder).items():
            for name in {first, second} & header.entries.keys():
                entry = header.entries[name]
                places[name] = folder / file, header.data_start + entry.start, entry
        (path, start, entry), (other_path, other_start, other) = places[first], places[second]
        if (entry.dtype, entry.shape) != (other.dtype, other.shape):
            return False
        return _equal(path, start, other_path, other_start, entry.end - entry.start)

    return same


def _equal(path: Path, start: int, other_path: Path, other_start: int, length: int) -> bool:
    try:
        with path.open("rb", 0) as left, other_path.open("rb", 0) as right:
            left.seek(start)
            right.seek(other_start)
            while length > 0:
                size = min(_PIECE, length)
                one, two = left.read(size), right.read(size)
                if not one or one != two[: len(one)]:
                    return False
                if len(one) != len(two):  # a short read of one of them
                    right.seek(len(one) - len(two), 1)
                length -= len(one)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from error
    return True
