"""What somebody may have meant who typed a path that is not there."""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path

from dllm_convert.errors import DataError

_LOOKED_AT = 10_000
"""Names of a folder that are compared at most."""
_ALIKE = 0.6


def _names(folder: Path) -> list[str]:
    """Return the names of a folder's folders and GGUF files; none if it cannot be read."""
    try:
        return [
            path.name
            for path in islice(folder.iterdir(), _LOOKED_AT)
            if path.suffix.lower() == ".gguf" or path.is_dir()
        ]
    except OSError:
        return []


def nearest_place(path: Path | str) -> Path | None:
    """Return the folder or GGUF file whose path is spelt most alike, None if nothing is near.

    Each part of the path that is not there is replaced by the name that is nearest to it.

    Args:
        path: A path that does not exist.
    """
    typed = Path(path).expanduser()
    found = Path(typed.anchor)
    for part in typed.relative_to(typed.anchor).parts:
        if (found / part).exists():
            found /= part
            continue
        by_folded = {name.casefold(): name for name in _names(found)}
        close = difflib.get_close_matches(part.casefold(), by_folded, n=1, cutoff=_ALIKE)
        if not close:
            return None
        found /= by_folded[close[0]]
    return None if found == Path() else found


def meant(path: Path | str) -> str:
    """Return the beginning of a hint: a question that names the nearest place, or nothing."""
    near = nearest_place(path)
    return f"Did you mean {near}? " if near else ""


def no_folder(folder: Path) -> DataError:
    """Return the error for a checkpoint's folder that is not there, or is a file."""
    if folder.exists():
        beside = (folder.parent / "config.json").is_file()
        return DataError(
            f"{folder} is not a folder",
            hint="Give the folder that dllm-convert run wrote"
            + (f", such as {folder.parent}" if beside else ""),
        )
    return DataError(
        f"there is no folder {folder}",
        hint=f"{meant(folder)}Give a folder that dllm-convert run wrote",
    )
