"""How the weights are stored: the index says exactly what is there, in the declared type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from dllm_convert.adapters import Adapter
from dllm_convert.source.folder import read_config
from dllm_convert.source.safetensors_header import (
    FLOATS,
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_NAMES,
    Header,
    TensorEntry,
    load_json_object,
    read_checkpoint,
)
from dllm_convert.source.tensor_names import stored_names
from dllm_convert.verification.report import Probe, first_items, none_wrong
from dllm_convert.verification.subject import Subject

_WEIGHTS = re.compile(
    r"(model|pytorch_model).*\.(safetensors|bin|pth?)|tf_model\.h5|flax_model\.msgpack"
)
"""Names that transformers has loaded weights by, now or before."""
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_DTYPES = {TORCH_NAMES[dtype]: dtype for dtype in FLOATS}


def check_storage(subject: Subject) -> list[Probe]:
    """Return the probes `index` and `dtypes`, from headers alone."""
    return [_index(subject), _dtypes(subject)]


def _index(subject: Subject) -> Probe:
    """Judge what `read_checkpoint` does not: strays, totals, the number of shards."""
    wrong: dict[str, str] = {}
    headers = subject.headers
    for path in sorted(subject.folder.iterdir()):
        if path.is_file() and path.name not in headers and _WEIGHTS.fullmatch(path.name):
            wrong[path.name] = "holds weights that nothing refers to"
    sharded = SINGLE_FILE not in headers
    if not sharded and (subject.folder / INDEX_FILE).is_file():
        wrong[INDEX_FILE] = f"lies beside {SINGLE_FILE}, and loaders take only one of them"
    if sharded:
        wrong |= _totals(subject) | _numbers(list(headers))
    return Probe(
        "index",
        not wrong,
        f"{len(wrong)} faults, {len(headers)} files, {'an' if sharded else 'no'} index",
        "0",
        first_items(wrong),
    )


def _totals(subject: Subject) -> dict[str, str]:
    entries = [entry for header in subject.headers.values() for entry in header.entries.values()]
    counted = {
        "total_size": sum(entry.end - entry.start for entry in entries),
        "total_parameters": sum(prod(entry.shape) for entry in entries),
    }
    metadata: Any = load_json_object(subject.folder / INDEX_FILE).get("metadata") or {}
    return {
        key: f"of the index is {metadata[key]}, the files hold {value}"
        for key, value in counted.items()
        if key in metadata and metadata[key] != value
    }


def _numbers(files: list[str]) -> dict[str, str]:
    found = [(file, match) for file in files if (match := _SHARD.fullmatch(file))]
    return {
        file: f"is one of {int(match[2])} shards, the index has {len(files)}"
        for file, match in found
        if int(match[2]) != len(files) or not 1 <= int(match[1]) <= len(files)
    }


def _matrices(headers: Mapping[str, Header], adapter: Adapter) -> dict[str, TensorEntry]:
    """Return the floating-point matrices by the names that transformers loads them by."""
    names = stored_names((n for header in headers.values() for n in header.entries), adapter)
    return {
        names[name]: entry
        for header in headers.values()
        for name, entry in header.entries.items()
        if entry.dtype in FLOATS and len(entry.shape) > 1
    }


def _declared(config: Mapping[str, Any]) -> Any:
    return config.get("dtype", config.get("torch_dtype"))


def _dtypes(subject: Subject) -> Probe:
    """Compare matrices with the type config.json declares.

    Vectors (norms, biases) may be wider: some bases keep them in float32. What the base stores in
    the same way is the base's, and was copied, where the config declares what the base's does or
    what most weights have: the plan corrects a base that declares neither.
    """
    matrices = _matrices(subject.headers, subject.adapter)
    sizes: Counter[str] = Counter()
    for entry in matrices.values():
        sizes[entry.dtype] += prod(entry.shape)
    stored = sizes.most_common(1)[0][0] if sizes else ""
    declared = _declared(subject.config)
    expected = stored if declared is None else _DTYPES.get(str(declared), str(declared))
    kept: Mapping[str, TensorEntry] = {}
    if subject.against is not None and (
        expected == stored or _declared(read_config(subject.against)) == declared
    ):
        kept = _matrices(read_checkpoint(subject.against), subject.adapter)
    wrong = {
        name: f"is {entry.dtype}"
        for name, entry in matrices.items()
        if entry.dtype != expected and not (name in kept and kept[name].dtype == entry.dtype)
    }
    return Probe(
        "dtypes",
        none_wrong(len(wrong), len(matrices)),
        f"{len(wrong)} of {len(matrices)} matrices differ, most are {stored}",
        f"0 from {expected}, {'as config.json declares' if declared else 'as most are'}",
        first_items(wrong),
    )
