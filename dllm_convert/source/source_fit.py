"""Fit a source, or a folder of weights, to its class: what `tensor_fit` decides, from the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dllm_convert.adapters.base import Adapter
from dllm_convert.source.config_numbers import check_numbers
from dllm_convert.source.fit import Fit
from dllm_convert.source.folder import read_config, tensor_infos
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.safetensors_header import read_checkpoint
from dllm_convert.source.same_bytes import comparer
from dllm_convert.source.tensor_fit import fit_tensors


def fit_folder(folder: Path, adapter: Adapter) -> Fit:
    """Fit a folder of safetensors to its class, bytes compared.

    Raises:
        DataError: A file is missing or broken.
        IncompatibleError: Tensors are missing, of another shape or type, or of another model.
    """
    config = read_config(folder)
    if adapter.measured is not None:
        config = {**config, **adapter.measured.config}
    tensors = tensor_infos(read_checkpoint(folder))
    check_numbers(config, adapter, len(tensors))
    return fit_tensors(config, tensors, adapter, same=comparer(folder))


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
    fit = fit_tensors(
        source.config,
        source.tensors,
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
