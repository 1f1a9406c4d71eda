"""Write the untrained conversion: weights streamed from file to file, config, tokenizer, code.

Only the vocabulary tensors change, and of those only single rows are computed: every other byte is
copied, so memory stays small and precision is the source's whatever its dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dllm_convert.console import Reporter, Task
from dllm_convert.disk import CHUNK_BYTES, read_chunks, writing
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.mask_token import MaskTokenDecision
from dllm_convert.plan import ConversionPlan
from dllm_convert.plan_checks import check_tensors, unused_tensors
from dllm_convert.safetensors_header import (
    DTYPE_BYTES,
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    Header,
    encode_header,
    load_json_object,
    read_checkpoint,
    read_header,
)
from dllm_convert.source_folder import (
    LICENCE_FILES,
    file_names,
    matching,
    read_config,
    tensor_infos,
)

if TYPE_CHECKING:
    import torch


_TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _RowEdit:
    """New rows of one vocabulary tensor.

    Attributes:
        row: Bytes of one row, the mean of the used ones.
        index: Row that is overwritten, None if it is among the appended ones.
        appended: How many times `row` is appended.
    """

    row: bytes
    index: int | None
    appended: int


def _mean_row(handle: BinaryIO, header: Header, entry: Entry, used_rows: int) -> bytes:
    """Return the mean of the first `used_rows` rows as bytes of the tensor's own dtype."""
    import torch

    if entry.dtype not in _TORCH_DTYPES:
        raise IncompatibleError(
            f"{header.file}: vocabulary tensors have dtype {entry.dtype}, "
            f"expected one of {', '.join(_TORCH_DTYPES)}"
        )
    dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[entry.dtype])
    width = prod(entry.shape[1:])
    row_bytes = width * DTYPE_BYTES[entry.dtype]
    total = torch.zeros(width, dtype=torch.float64)
    per_read = max(1, CHUNK_BYTES // max(1, row_bytes))
    for first in range(0, used_rows, per_read):
        rows = min(per_read, used_rows - first)
        start = header.data_start + entry.start + first * row_bytes
        data = b"".join(read_chunks(handle, start, rows * row_bytes))
        values = torch.frombuffer(bytearray(data), dtype=dtype).view(rows, width)
        total += values.to(torch.float64).sum(0)
    mean = (total / used_rows).to(dtype)
    if not bool(mean.isfinite().all()):
        raise IncompatibleError(f"{header.file}: the embedding has values that are not finite")
    return mean.view(torch.uint8).numpy().tobytes()


def _edits(
    handle: BinaryIO, header: Header, names: tuple[str, ...], mask: MaskTokenDecision
) -> dict[str, _RowEdit]:
    appended = mask.rows_after - mask.rows_before
    if not (mask.write_row or appended):
        return {}
    index = mask.id if mask.write_row and mask.id < mask.rows_before else None
    return {
        name: _RowEdit(_mean_row(handle, header, entry, mask.used_rows), index, appended)
        for name, entry in header.entries.items()
        if name in names
    }


def _new_header(
    kept: Mapping[str, Entry], metadata: Mapping[str, str], edits: Mapping[str, _RowEdit]
) -> bytes:
    """Return length and JSON of the header with grown tensors."""
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for name, entry in kept.items():
        edit = edits.get(name)
        added = edit.appended if edit else 0
        shape = [entry.shape[0] + added, *entry.shape[1:]] if edit else list(entry.shape)
        size = entry.end - entry.start + (added * len(edit.row) if edit else 0)
        tensors[name] = (entry.dtype, shape, size)
    return encode_header(tensors, metadata)


def _write_entry(
    source: BinaryIO, out: BinaryIO, start: int, entry: Entry, edit: _RowEdit | None, task: Task
) -> None:
    written_at = out.tell()
    for chunk in read_chunks(source, start, entry.end - entry.start):
        out.write(chunk)
        task.advance(len(chunk))
    if edit is None:
        return
    out.write(edit.row * edit.appended)
    if edit.index is not None:
        end = out.tell()
        out.seek(written_at + edit.index * len(edit.row))
        out.write(edit.row)
        out.seek(end)


def _write_shard(
    source_path: Path,
    out_path: Path,
    header: Header,
    kept: Mapping[str, Entry],
    names: tuple[str, ...],
    mask: MaskTokenDecision,
    task: Task,
) -> None:
    """Write one file: the kept tensors in their order, the vocabulary's with their new rows."""
    with source_path.open("rb") as source:
        edits = _edits(source, header, names, mask)
        if not edits and "format" in header.metadata and len(kept) == len(header.entries):
            shutil.copyfile(source_path, out_path)
            task.advance(source_path.stat().st_size)
            return
        with out_path.open("wb") as out:
            out.write(_new_header(kept, header.metadata, edits))
            for name, entry in kept.items():
                start = header.data_start + entry.start
                _write_entry(source, out, start, entry, edits.get(name), task)


def _write_index(
    source: Path, out: Path, headers: Mapping[str, Header], dropped: frozenset[str]
) -> None:
    """Write the index with its totals counted anew; the tensors stay in their files."""
    index = load_json_object(source / INDEX_FILE)
    written = [read_header(out / file) for file in headers]
    entries = [entry for header in written for entry in header.entries.values()]
    metadata = {
        **(index.get("metadata") or {}),
        "total_parameters": sum(prod(entry.shape) for entry in entries),
        "total_size": sum(entry.end - entry.start for entry in entries),
    }
    weight_map = {n: file for n, file in index["weight_map"].items() if n not in dropped}
    _write_json(out / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(plan: ConversionPlan, source: Path, out: Path, reporter: Reporter) -> None:
    headers = read_checkpoint(source)
    config = read_config(source)
    tensors = tensor_infos(headers)
    names = check_tensors(config, tensors, plan.adapter, rows=plan.mask.rows_before)
    dropped = frozenset(unused_tensors(tensors, plan.adapter))
    total = sum((source / file).stat().st_size for file in headers)
    with reporter.task("write weights", total=total) as task:
        for file, header in headers.items():
            kept = {name: e for name, e in header.entries.items() if name not in dropped}
            _write_shard(source / file, out / file, header, kept, names, plan.mask, task)
    if SINGLE_FILE not in headers:
        _write_index(source, out, headers, dropped)


def _write_configs(plan: ConversionPlan, source: Path, out: Path) -> None:
    config = read_config(source)
    for key in ("_name_or_path", "quantization_config"):
        config.pop(key, None)
    _write_json(out / "config.json", {**config, **plan.config_updates})
    path = source / "generation_config.json"
    base = load_json_object(path) if path.is_file() else {}
    chosen = plan.recipe.generation
    generation = {
        **{
            f"{role}_token_id": base.get(f"{role}_token_id", config.get(f"{role}_token_id"))
            for role in ("bos", "eos", "pad")
        },
        "mask_token_id": plan.mask.id,
        "max_new_tokens": chosen.max_new_tokens,
        "max_denoising_steps": chosen.max_denoising_steps,
        "confidence_threshold": chosen.confidence_threshold,
        # transformers takes a temperature for a mistake unless sampling is said to be meant.
        "temperature": chosen.temperature or None,
        "do_sample": True if chosen.temperature else None,
        "block_size": plan.recipe.block_size,
    }
    known = {key: value for key, value in generation.items() if value is not None}
    _write_json(out / "generation_config.json", known)


def _needed_bytes(plan: ConversionPlan, source: Path) -> int:
    files = [path for path in source.iterdir() if path.is_file()]
    rows = plan.mask.rows_after - plan.mask.rows_before
    hidden = plan.config_updates.get("hidden_size", plan.source.config.get("hidden_size", 0))
    return sum(path.stat().st_size for path in files) + 2 * rows * int(hidden) * 4


def adapt(plan: ConversionPlan, source_dir: Path, out: Path, reporter: Reporter) -> None:
    """Write the converted, untrained checkpoint.

    Args:
        plan: What to write.
        source_dir: Folder from `materialise`.
        out: Folder to create; it must not hold anything yet.
        reporter: Progress.

    Raises:
        DataError: A source file is broken, or the disk is full.
        IncompatibleError: The weights or the tokenizer turn out not to fit the plan.
    """
    from dllm_convert.bundle import write_modeling
    from dllm_convert.tokenizer_output import write_tokenizer

    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty, expected a new folder")
    with writing(out, _needed_bytes(plan, source_dir)):
        out.mkdir(parents=True, exist_ok=True)
        _write_weights(plan, source_dir, out, reporter)
        _write_configs(plan, source_dir, out)
        write_tokenizer(plan.mask, source_dir, out)
        write_modeling(out, plan.adapter)
        for name in matching(file_names(source_dir), LICENCE_FILES):
            shutil.copyfile(source_dir / name, out / name)
