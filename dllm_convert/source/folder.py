"""See a checkpoint folder through its config, headers and tokenizer files."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dllm_convert.adapters import has_adapter
from dllm_convert.common.foreign_files import (
    MAX_TEXT_BYTES,
    MAX_VOCABULARY_BYTES,
    check_file,
    check_inside,
)
from dllm_convert.common.json_files import is_pointer, pointer
from dllm_convert.common.nearest import no_folder
from dllm_convert.errors import DataError, IncompatibleError, UnsupportedError
from dllm_convert.source.base_card import read_base_card
from dllm_convert.source.info import SourceInfo, TensorInfo, TokenizerInfo
from dllm_convert.source.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    load_json_object,
    read_checkpoint,
)
from dllm_convert.source.tokenizer_files import SIDE_FILES, VOCABULARY_FILES, read_tokenizer
from dllm_convert.source.wrong_source import no_config, no_weights

PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLE_FILES = (PICKLE_FILE, PICKLE_INDEX)
"""One of these says that there are pickled weights."""
ALL_PICKLES = ("pytorch_model*.bin", PICKLE_INDEX)
"""Files of pickled weights, as patterns."""
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

_POINTER_BYTES = 1024
"""A pointer of git-LFS is smaller."""

PICKLE_WARNING = (
    "the weights are a pickle (pytorch_model.bin): they are read with weights_only=True and "
    "converted to safetensors once; their shapes are not known before that"
)


def check_pickle(source: SourceInfo, *, allowed: bool, instead: str | None = None) -> None:
    """Check that pickled weights were asked for.

    Args:
        source: Whose weights are to be read.
        allowed: Whether they were.
        instead: What to do where they cannot be; by default how they are asked for.

    Raises:
        IncompatibleError: The weights are pickles, and nobody said so.
    """
    pickles = [name for name in source.files if name.endswith(".bin")]
    if pickles and not source.tensors and not allowed:
        raise IncompatibleError(
            f"the weights are a pickle ({pickles[0]}), which can hold code, expected safetensors",
            hint=instead
            or "Take a safetensors version, or add --allow-pickle: it is read with "
            "weights_only=True, which runs no code, and converted once",
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


def check_kinds(folder: Path) -> None:
    """Check that what is called as a checkpoint's file is one: a link to nothing is no absence.

    Raises:
        DataError: It is a dangling link, a pipe, a device or a socket.
    """
    entries = {path.name: path for path in folder.iterdir() if not path.is_dir()}
    for name in matching(entries, (*SMALL_FILES, SINGLE_FILE, INDEX_FILE)):
        path = entries[name]
        if not path.exists():
            raise DataError(
                f"{path} is a link to {path.readlink()}, where nothing is",
                hint="Download the file again, or remove the link",
            )
        check_file(path)


def _nearby(folder: Path) -> str | None:
    """Name a folder below that has a config.json, None if there is none."""
    inside = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if not inside:
        return None
    more = f", one of {len(inside)}" if len(inside) > 1 else ""
    return f"Did you mean {inside[0].parent}{more}?"


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        DataError: It is missing, broken, or names no family.
    """
    if not folder.is_dir():
        raise no_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise no_config(str(folder), [path.name for path in folder.iterdir()], _nearby(folder))
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


def tokenizer_of(folder: Path, config: Mapping[str, Any]) -> TokenizerInfo:
    """Read the tokenizer of a checkpoint whose family may not be one that is converted.

    Raises:
        DataError: It cannot be read.
        UnsupportedError: It cannot be read, and the family has no adapter: that comes first.
    """
    try:
        return read_tokenizer(folder, config)
    except DataError as error:
        model_type = str(config["model_type"])
        if has_adapter(model_type):
            raise
        raise UnsupportedError(
            f"model_type {model_type!r} has no adapter, and without a tokenizer that can be read "
            f"it cannot be measured either ({error.message})",
            hint="`dllm-convert architectures` lists the families",
        ) from error


def inspect_folder(folder: Path, given: str) -> SourceInfo:
    """Read what a plan needs from a local checkpoint folder.

    Raises:
        DataError: Something is missing or broken.
    """
    if folder.is_dir():
        check_kinds(folder)
    config = read_config(folder)
    names = file_names(folder)
    if not matching(names, (SINGLE_FILE, INDEX_FILE, *PICKLE_FILES)):
        raise no_weights(str(folder), names)
    headers: dict[str, Header] = {}
    weights: list[str]
    if SINGLE_FILE not in names and INDEX_FILE not in names and matching(names, PICKLE_FILES):
        weights = matching(names, ALL_PICKLES)
    else:
        headers = read_checkpoint(folder)
        weights = [*headers, *([INDEX_FILE] if SINGLE_FILE not in headers else [])]
    small = matching(names, SMALL_FILES)
    files = (*weights, *small)
    check_inside(folder, files)
    for name in small:
        check_file(folder / name, MAX_VOCABULARY_BYTES)
    for name in matching(small, LICENCE_FILES):
        check_file(folder / name, MAX_TEXT_BYTES)
    stats = {name: (folder / name).stat() for name in files}
    for name, stat in stats.items():
        if stat.st_size < _POINTER_BYTES and is_pointer(folder / name):
            raise pointer(name)
    return SourceInfo(
        given=given,
        kind="folder",
        path=folder,
        repo_id=None,
        revision=None,
        config=config,
        tensors=tensor_infos(headers),
        tokenizer=tokenizer_of(folder, config),
        card=read_base_card(folder / "README.md"),
        fingerprint={name: f"{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats.items()},
        files=files,
        beside=tuple(sorted(names)),
        warnings=() if headers else (PICKLE_WARNING,),
        generation=read_generation(folder),
    )
