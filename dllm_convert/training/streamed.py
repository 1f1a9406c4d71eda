"""Write weights tensor by tensor: the files that transformers would write of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from dllm_convert.common import strict_json
from dllm_convert.common.copying import write_all
from dllm_convert.source.safetensors_header import INDEX_FILE, TORCH_NAMES, encode_header

MAX_FILE = "50GB"
"""Where transformers begins another file."""
_PIECE = 1 << 26
"""Bytes that are cast at once."""
_HEADER_NAMES = {getattr(torch, name): short for short, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Layout:
    """Which tensors of a model stand in which file.

    Attributes:
        files: File name to tensors in file order, without data, in the types they are stored in.
        index: Content of the index; None if there is one file.
    """

    files: Mapping[str, Mapping[str, torch.Tensor]]
    index: Mapping[str, Any] | None


def layout_of(model: Any, stored: torch.dtype, max_file: str = MAX_FILE) -> Layout:
    """Lay out what transformers would write of a model.

    Args:
        model: A transformers model; its weights are not looked at.
        stored: Type that floats are written in.
        max_file: Size of a file, as Hugging Face's libraries read one.
    """
    state = model.state_dict(keep_vars=True)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    left_out = {name for name, of in tied.items() if state.get(name) is state.get(of)}
    left_out |= set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tensors = {
        name: torch.empty(
            tensor.shape,
            dtype=stored if tensor.is_floating_point() else tensor.dtype,
            device="meta",
        )
        for name, tensor in sorted(state.items(), key=lambda item: _in_turn(item[0]))
        if name not in left_out
    }
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_file
    )
    files = {
        file: {
            name: tensors[name] for name in sorted(names, key=lambda name: _order(tensors, name))
        }
        for file, names in split.filename_to_tensors.items()
    }
    if not split.is_sharded:
        return Layout(files, None)
    facts = {"total_parameters": model.num_parameters(), **split.metadata}
    return Layout(files, {"metadata": facts, "weight_map": split.tensor_to_filename})


def _in_turn(name: str) -> list[tuple[bool, int, str]]:
    """Where transformers puts a tensor when it fills files: layer 10 after layer 9."""
    parts = name.split(".")
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _order(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, str]:
    """Where the reference implementation puts a tensor: the widest type first, then by name."""
    return -tensors[name].dtype.itemsize, name


def write_weights(
    folder: Path, layout: Layout, tensor: Callable[[str], torch.Tensor | None], *, writes: bool
) -> None:
    """Write the files of a layout; of several processes all call this, and one writes.

    Args:
        folder: Where the files are created.
        layout: What stands where.
        tensor: Returns a tensor by its name, where this process writes; asked for in the same order
            in all processes.
        writes: Whether this process writes.
    """
    for file, tensors in layout.files.items():
        if not writes:
            for name in tensors:
                tensor(name)
            continue
        header = {
            name: (_HEADER_NAMES[empty.dtype], empty.shape, empty.numel() * empty.dtype.itemsize)
            for name, empty in tensors.items()
        }
        with (folder / file).open("xb", buffering=0) as handle:
            write_all(handle.fileno(), encode_header(header, {}))
            for name, empty in tensors.items():
                found = tensor(name)
                if found is None or found.shape != empty.shape:
                    raise RuntimeError(f"{name} is not what the layout says it is")
                _write(handle.fileno(), found, empty.dtype)
    if writes and layout.index is not None:
        text = strict_json.dumps(layout.index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _write(handle: int, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Write the numbers of a tensor, row-major, cast a few at a time."""
    flat = tensor.detach().reshape(-1)
    step = _PIECE // dtype.itemsize
    for at in range(0, len(flat), step):
        piece = flat[at : at + step].to(dtype).contiguous()
        write_all(handle, piece.view(torch.uint8).numpy().data)
