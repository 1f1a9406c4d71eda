"""Turn pickled weights into safetensors, one file and one tensor after the other."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.json_files import write_config
from dllm_convert.errors import DataError
from dllm_convert.source.folder import PICKLE_FILE, PICKLE_INDEX
from dllm_convert.source.info import TensorInfo
from dllm_convert.source.quantised import check_packed
from dllm_convert.source.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_NAMES,
    encode_header,
    read_weight_map,
)

if TYPE_CHECKING:
    import torch

_CODES = {name: dtype for dtype, name in TORCH_NAMES.items()}
_FLOATING = tuple(name for name in _CODES if "float" in name)
_PIECE = 4 << 20


def pickle_files(folder: Path) -> list[str]:
    """Return the names of a folder's pickled weights.

    Raises:
        DataError: The index names a file that is missing.
    """
    index = folder / PICKLE_INDEX
    if (folder / PICKLE_FILE).is_file() or not index.is_file():
        return [PICKLE_FILE]
    names = sorted(set(read_weight_map(index, suffix=".bin").values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{PICKLE_INDEX} names {', '.join(missing[:3])}, which is missing")
    return names


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Map a state dict into memory; a file older than torch 1.6 has to be read whole."""
    import torch

    def read(*, mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        try:
            state = read(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = read(mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path.name}: not a state dict of tensors, or damaged ({reason})",
            hint="Take a safetensors version; this tool runs no code from a pickle",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise DataError(f"{path.name}: expected a mapping of names to tensors")
    return state


def _kept(state: dict[str, torch.Tensor], keep: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, each tied one once: under the name `keep` where it has it."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name in sorted(state, key=lambda name: (name != keep, name)):
        tensor = state[name]
        key = (tensor.data_ptr(), tuple(tensor.shape))
        # position_ids and the like are buffers that the model computes.
        if tensor.is_floating_point() and (tensor.numel() == 0 or key not in seen):
            seen.add(key)
            yield name, tensor


def _save(state: dict[str, torch.Tensor], out: Path, keep: str) -> list[str]:
    """Write a file of safetensors and return the names of its tensors."""
    import torch

    check_packed(_described(state))
    tensors = dict(_kept(state, keep))
    described = {
        name: (_dtype(out, name, t), tuple(t.shape), t.numel() * t.element_size())
        for name, t in tensors.items()
    }
    # By hand, a piece at a time: safetensors' own writer tells a full disk in words only, and older
    # releases copy every tensor of the file before they write the first.
    with out.open("wb") as file:
        file.write(encode_header(described, {"format": "pt"}))
        for tensor in tensors.values():
            data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), _PIECE):
                file.write(data[start : start + _PIECE].data)
    return list(tensors)


def _described(state: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Describe all tensors of a pickle; those that are not kept tell how it was packed."""
    return {
        name: TensorInfo(
            _CODES.get(str(tensor.dtype).removeprefix("torch."), "?"), tuple(tensor.shape), ""
        )
        for name, tensor in state.items()
    }


def _dtype(out: Path, name: str, tensor: torch.Tensor) -> str:
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in _FLOATING:
        raise DataError(f"{out.name}: {name} has dtype {found}, expected {', '.join(_FLOATING)}")
    return _CODES[found]


def convert_pickles(folder: Path, names: list[str], out: Path, keep: str) -> None:
    """Write the weights of pickles as safetensors, file by file.

    Args:
        folder: Folder of the pickles.
        names: Their names.
        out: Folder to write into.
        keep: Which of several names of one tensor stays.

    Raises:
        DataError: A file is not a state dict, or damaged.
        IncompatibleError: The weights are quantised.
    """
    weight_map: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        file = SINGLE_FILE
        if len(names) > 1:
            file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        weight_map |= dict.fromkeys(_save(_load(folder / name), out / file, keep), file)
    if len(names) > 1:
        total = sum((out / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_config(out / INDEX_FILE, index)


def copy_others(folder: Path, names: list[str], out: Path) -> None:
    """Copy the files beside the weights."""
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
