"""Dequantise a GGUF file into safetensors, some rows at a time, to what transformers would load.

transformers builds the whole model for it, and reads every token of the vocabulary through the
`gguf` package several times. Here config and tokenizer are made by transformers, the weights are
not: names, the order of rows in rotary heads and types are as in its modeling_gguf_pytorch_utils.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.adapters import get_adapter
from dllm_convert.common.copying import workers, write_all
from dllm_convert.common.json_files import write_config
from dllm_convert.errors import DataError
from dllm_convert.source.gguf import stock_name
from dllm_convert.source.gguf_header import GGML_TYPES, GgufHeader, GgufTensor, read_gguf_header
from dllm_convert.source.safetensors_header import SINGLE_FILE, encode_header

if TYPE_CHECKING:
    import torch

_VALUES_AT_ONCE = 1 << 21
_HALF_TYPES = frozenset({"F16", "BF16"})
_HINT = "Take the safetensors of this model, or a GGUF file in F16 or Q8_0"


def is_half(header: GgufHeader) -> bool:
    """Whether the matrices are in half precision, so that float32 would gain nothing.

    Products of a 4-bit number and a float16 scale do not fit bfloat16.
    """
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return kinds <= _HALF_TYPES


@dataclass(frozen=True)
class _Rows:
    """A tensor as rows that are quantised one by one.

    Attributes:
        tensor: Where it lies.
        count: Number of rows; a vector counts as rows of one value.
        width: Values per row.
        row_bytes: Bytes per row in the file.
        heads: Heads whose rows are interleaved for another rotary embedding, 0 if none are.
    """

    tensor: GgufTensor
    count: int
    width: int
    row_bytes: int
    heads: int

    @classmethod
    def of(cls, name: str, header: GgufHeader) -> _Rows:
        tensor = header.tensors[name]
        count = tensor.shape[0] if tensor.shape else 1
        width = prod(tensor.shape[1:])
        _, elements, size = next(kind for kind in GGML_TYPES.values() if kind[0] == tensor.kind)
        heads = _rotary_heads(name, header)
        if heads and count % (2 * heads):
            raise DataError(f"{name} has {count} rows, expected a multiple of 2 x {heads} heads")
        if not heads and len(tensor.shape) < 2:
            # One row of many values is quicker than many rows of one.
            count, width = 1, count * width
        return cls(tensor, count, width, width // elements * size, heads)

    def order(self) -> Any:
        """Return which row of the file is row i of the tensor."""
        import numpy as np

        rows = np.arange(self.count)
        if not self.heads:
            return rows
        return rows.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _rotary_heads(name: str, header: GgufHeader) -> int:
    """Return in how many heads llama.cpp has interleaved the rows of a tensor."""
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama" or not (".attn_q." in name or ".attn_k." in name):
        return 0
    counts = [
        header.metadata.get(f"llama.attention.{key}") for key in ("head_count", "head_count_kv")
    ]
    if None in counts:
        return 0
    return int(counts[".attn_k." in name])  # type: ignore[arg-type]


def _values(rows: _Rows, raw: Any, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor, some rows at a time, each of `dtype` and flat."""
    import gguf
    import torch

    start, size = rows.tensor.start, rows.count * rows.row_bytes
    stored = raw[start : start + size].reshape(rows.count, rows.row_bytes)
    order, kind = rows.order(), gguf.GGMLQuantizationType[rows.tensor.kind]
    step = max(1, _VALUES_AT_ONCE // max(1, rows.width))
    for first in range(0, rows.count, step):
        part = stored[order[first : first + step]]
        values = gguf.dequantize(part, kind)
        yield torch.from_numpy(values).reshape(-1).to(dtype)


def _write_weights(
    header: GgufHeader, path: Path, out: Path, names: dict[str, str], dtype: torch.dtype
) -> None:
    """Write the tensors `names` (in the file to in the model), several at once."""
    import numpy as np
    import torch

    raw = np.memmap(path, dtype=np.uint8, mode="r")
    rows = {name: _Rows.of(name, header) for name in names}
    element, code = dtype.itemsize, {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    described = {
        names[name]: (code, header.tensors[name].shape, r.count * r.width * element)
        for name, r in rows.items()
    }
    head = encode_header(described, {"format": "pt"})
    starts, position = {}, len(head)
    for name in names:
        starts[name] = position
        position += described[names[name]][2]
    with out.open("wb") as file:
        file.write(head)
        file.truncate(position)

    def write(name: str) -> None:
        with out.open("r+b", buffering=0) as file:
            file.seek(starts[name])
            for values in _values(rows[name], raw, dtype):
                data: Any = values.view(torch.uint8).numpy()
                write_all(file.fileno(), data.data)

    with ThreadPoolExecutor(workers()) as pool:
        list(pool.map(write, names))


def _names(header: GgufHeader, model: Any, file: str) -> dict[str, str]:
    """Return name in the file to name in the model, of all weights; a tied one has one name.

    Raises:
        DataError: A tensor is missing or misshapen, where transformers would make one up.
    """
    tied = model.all_tied_weights_keys
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    names = {name: stock for name in header.tensors if (stock := stock_name(name)) in shapes}
    missing = sorted(shapes.keys() - set(names.values()))
    if missing:
        raise DataError(
            f"{file}: no tensor for {', '.join(missing[:3])}, expected a complete "
            f"{type(model).__name__}",
            hint=_HINT,
        )
    for name, stock in names.items():
        found = header.tensors[name].shape
        if found != shapes[stock]:
            raise DataError(
                f"{file}: {name} has shape {found}, expected {shapes[stock]}", hint=_HINT
            )
    return names


def _write_config(model: Any, out: Path, dtype: torch.dtype) -> None:
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    if model.can_generate():
        model.generation_config.save_pretrained(out)
    config_path = out / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    write_config(config_path, config)


def dequantise(path: Path, out: Path, model_type: str) -> None:
    """Write a GGUF file as a folder of safetensors, config and tokenizer.

    Args:
        path: The file.
        out: Folder to write into.
        model_type: Its family.

    Raises:
        DataError: transformers cannot read its config or tokenizer, or tensors are missing.
    """
    import torch
    import transformers

    header = read_gguf_header(path)
    adapter = get_adapter(model_type)
    dtype = torch.bfloat16 if is_half(header) else torch.float32
    try:
        config = transformers.AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        with torch.device("meta"):
            model = getattr(transformers, adapter.auto_class).from_config(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    except (ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"{path.name}: transformers cannot read it ({error})", hint=_HINT
        ) from error
    names = _names(header, model, path.name)
    _write_weights(header, path, out / SINGLE_FILE, names, dtype)
    _write_config(model, out, dtype)
    tokenizer.save_pretrained(out)
