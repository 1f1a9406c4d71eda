"""Fit a source, or a folder of weights, to its class: what `tensor_fit` decides, from the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.source.config_numbers import check_numbers
from dllm_convert.source.fit import Fit, Same
from dllm_convert.source.folder import read_config, tensor_infos
from dllm_convert.source.info import SourceInfo, TensorInfo
from dllm_convert.source.safetensors_header import read_checkpoint
from dllm_convert.source.same_bytes import comparer
from dllm_convert.source.tensor_fit import fit_tensors
from dllm_convert.source.text_model import inner_names, read_text_config, text_names


def fit_folder(folder: Path, adapter: Adapter) -> Fit:
    """Fit a folder of safetensors to its class, bytes compared.

    Raises:
        DataError: A file is missing or broken.
        IncompatibleError: Tensors are missing, of another shape or type, or of another model.
    """
    stored = read_config(folder)
    config = read_text_config(stored)
    if adapter.measured is not None:
        config = {**config, **adapter.measured.config}
    tensors = tensor_infos(read_checkpoint(folder))
    check_numbers(config, adapter, len(tensors))
    names = inner_names(stored, tensors)
    return _fit(config, tensors, names, adapter, same=comparer(folder))


def _fit(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    names: Mapping[str, str],
    adapter: Adapter,
    *,
    same: Same,
    **settings: Any,
) -> Fit:
    """Fit the tensors of a text model, `names` of those in the files; others are left out."""
    files = {new: old for old, new in names.items()}

    def same_here(one: str, other: str) -> bool | None:
        return same(files[one], files[other])

    inner = {new: tensors[old] for new, old in files.items()}
    fit = fit_tensors(config, inner, adapter, same=same_here, **settings)
    behind = tuple(name for name in tensors if name not in names)
    return replace(
        fit,
        names={files[name]: new for name, new in fit.names.items()},
        dropped=(*(files[name] for name in fit.dropped), *behind),
    )


def fit_source(source: SourceInfo, adapter: Adapter) -> tuple[Fit, SourceInfo, frozenset[str]]:
    """Fit a source to its class, as far as it can be seen before it is on this disk.

    Returns:
        The fit; the source as its class sees it, under the class's names and with a config that
        says what the files say; and the files that hold tensors which are left out or renamed.

    Raises:
        IncompatibleError: Tensors are missing, of another shape or type, or of another model.
    """
    if not source.tensors:
        return Fit({}), source, frozenset()
    held = source.tensors
    fit = _fit(
        source.config,
        held,
        {name: name for name in held} if source.inside is None else text_names(held),
        adapter,
        same=comparer(source.path if source.kind == "folder" else None),
        typed=source.kind != "gguf",
        beside=source.beside,
    )
    seen = replace(
        source,
        config={**source.config, **fit.config},
        tensors={new: source.tensors[old] for old, new in fit.names.items()},
        twins=fit.twins,
    )
    files = frozenset(source.tensors[name].file for name in (*fit.dropped, *fit.renamed))
    return fit, seen, files
