"""How the weights are stored: the index says exactly what is there, in the declared type."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from typing import Any

from dllm_convert.safetensors_header import INDEX_FILE, SINGLE_FILE, load_json_object
from dllm_convert.verify.report import Probe, first_items
from dllm_convert.verify.subject import Subject

_WEIGHTS = re.compile(
    r".*\.(safetensors|ckpt|gguf|msgpack|h5|onnx)|(pytorch_model|model|consolidated).*\.(bin|pth?)"
)
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATING = frozenset(_DTYPES.values())


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


def _dtypes(subject: Subject) -> Probe:
    """Compare matrices with the type config.json declares.

    Vectors (norms, biases) may be wider: some bases keep them in float32.
    """
    sizes: Counter[str] = Counter()
    matrices: dict[str, str] = {}
    for header in subject.headers.values():
        for name, entry in header.entries.items():
            if entry.dtype in _FLOATING and len(entry.shape) > 1:
                sizes[entry.dtype] += entry.end - entry.start
                matrices[name] = entry.dtype
    stored = sizes.most_common(1)[0][0] if sizes else ""
    declared = subject.config.get("dtype", subject.config.get("torch_dtype"))
    expected = _DTYPES.get(str(declared), stored if declared is None else str(declared))
    wrong = {name: f"is {dtype}" for name, dtype in matrices.items() if dtype != expected}
    return Probe(
        "dtypes",
        not wrong,
        f"{len(wrong)} of {len(matrices)} matrices differ, most are {stored}",
        f"0 from {expected}, {'as config.json declares' if declared else 'as most are'}",
        first_items(wrong),
    )
