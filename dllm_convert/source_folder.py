"""See a checkpoint folder through its config, headers and tokenizer files."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dllm_convert.base_card import read_base_card
from dllm_convert.errors import DataError
from dllm_convert.nearest import no_folder
from dllm_convert.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    load_json_object,
    read_checkpoint,
)
from dllm_convert.source_info import SourceInfo, TensorInfo
from dllm_convert.tokenizer_files import SIDE_FILES, VOCABULARY_FILES, read_tokenizer

PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LICENCE_FILES = (
    *("LICENSE*", "LICENCE*", "License*", "license*", "MODEL_LICENSE*", "COPYING*"),
    *("NOTICE*", "Notice*", "USE_POLICY*"),
)
"""What has to travel with every model made from a base, as patterns."""
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    *VOCABULARY_FILES,
    *SIDE_FILES,
    "additional_chat_templates/*.jinja",
    *LICENCE_FILES,
    "README.md",
)
"""Everything of a checkpoint but the weights, as patterns."""

PICKLE_WARNING = (
    "the weights are a pickle (pytorch_model.bin): they are read with weights_only=True and "
    "converted to safetensors once; their shapes are not known before that"
)


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that match one of the patterns, sorted."""
    patterns = tuple(patterns)
    return sorted(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns))


def file_names(folder: Path) -> list[str]:
    """Return the names of all files of a folder, with the chat templates one level down."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    names += [
        f"{path.parent.name}/{path.name}"
        for path in folder.glob("additional_chat_templates/*.jinja")
    ]
    return names


def _what_else(folder: Path) -> str:
    """Say what to do with a folder that has no config.json, by what it has instead."""
    if any(folder.glob("*.gguf")):
        return "Give one of its .gguf files"
    if (folder / "adapter_config.json").is_file():
        return "It holds an adapter: merge it into its base, and give the merged model"
    if any(folder.glob("consolidated*")):
        return "It holds weights as their vendor trained them: take the transformers version"
    inside = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if inside:
        more = f", one of {len(inside)}" if len(inside) > 1 else ""
        return f"Did you mean {inside[0].parent}{more}?"
    return "Give the folder that holds config.json beside the weights"


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        DataError: It is missing, broken, or names no family.
    """
    if not folder.is_dir():
        raise no_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(
            f"no config.json in {folder}, expected a folder written by save_pretrained",
            hint=_what_else(folder),
        )
    config = load_json_object(path)
    if not isinstance(config.get("model_type"), str):
        raise DataError(
            f"config.json: model_type is {config.get('model_type')!r}, expected a family's name",
            hint="Add the model_type of the architecture, for instance llama",
        )
    return config


def read_generation(folder: Path) -> dict[str, Any]:
    """Read generation_config.json; empty if there is none.

    Raises:
        DataError: It is broken.
    """
    path = folder / "generation_config.json"
    return load_json_object(path) if path.is_file() else {}


def tensor_infos(headers: Mapping[str, Header]) -> dict[str, TensorInfo]:
    """Return tensor name to description over all files of a checkpoint."""
    return {
        name: TensorInfo(entry.dtype, entry.shape, file)
        for file, header in headers.items()
        for name, entry in header.entries.items()
    }


def inspect_folder(folder: Path, given: str) -> SourceInfo:
    """Read what a plan needs from a local checkpoint folder.

    Raises:
        DataError: Something is missing or broken.
    """
    config = read_config(folder)
    names = file_names(folder)
    headers: dict[str, Header] = {}
    weights: list[str]
    if SINGLE_FILE not in names and INDEX_FILE not in names and matching(names, PICKLE_FILES):
        weights = matching(names, ("pytorch_model*.bin", "pytorch_model.bin.index.json"))
    else:
        headers = read_checkpoint(folder)
        weights = [*headers, *([INDEX_FILE] if SINGLE_FILE not in headers else [])]
    files = (*weights, *matching(names, SMALL_FILES))
    stats = {name: (folder / name).stat() for name in files}
    return SourceInfo(
        given=given,
        kind="folder",
        path=folder,
        repo_id=None,
        revision=None,
        config=config,
        tensors=tensor_infos(headers),
        tokenizer=read_tokenizer(folder, config),
        card=read_base_card(folder / "README.md"),
        fingerprint={name: f"{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats.items()},
        files=files,
        warnings=() if headers else (PICKLE_WARNING,),
        generation=read_generation(folder),
    )
