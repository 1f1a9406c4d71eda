"""Tiny conversions that GGUF files are made of."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conversion import convert

from dllm_convert.planning.layouts.gguf import Stored
from dllm_convert.serving.gguf_tokens import tokenizer_keys
from dllm_convert.serving.gguf_writing import Weights, write_gguf
from dllm_convert.serving.llama_cpp import LlamaCpp

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Make = Callable[..., Path]
ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None,
    reason="cyllama is not installed: make test-serving installs it",
)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def maker(root: Path, source_cache: Callable[..., Path]) -> Make:
    """Return a maker of tiny conversions, each once."""
    made: dict[str, Path] = {}

    def make(
        family: str,
        *,
        target: str = "bd3lm",
        shift: str = "keep",
        block: int = 4,
        recipe: dict[str, Any] | None = None,
        **source: Any,
    ) -> Path:
        key = repr((family, target, shift, block, recipe, sorted(source.items())))
        if key not in made:
            made[key] = root / f"{family}-{target}-{len(made)}"
            fields = {"token_shift": shift, **(recipe or {})}
            convert(source_cache(family, **source), made[key], target, block=block, **fields)
        return made[key]

    return make


def with_rope(folder: Path, **rope: Any) -> Path:
    """Return a copy of a conversion with another rotary embedding."""
    copy = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    folder = Path(shutil.copytree(folder, copy))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e4, **rope}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def file_of(folder: Path) -> Path:
    """Return the one GGUF file of an export."""
    (file,) = folder.glob("*.gguf")
    return file


def engine_of(tokenizer: Any, path: Path) -> LlamaCpp:
    """Return llama.cpp with a tokenizer's keys in the file of a model that computes nothing."""
    rows, size = len(tokenizer) + 5, 32
    sizes = {
        **dict.fromkeys(("context_length", "embedding_length", "feed_forward_length"), size),
        **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), 4),
        "block_count": 1,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    keys = {
        **{f"llama.{key}": value for key, value in sizes.items()},
        **tokenizer_keys(tokenizer, rows=rows, mask=tokenizer.mask_token_id or 0),
    }
    square, line = (size, size), (size,)
    inside = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
    inside |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), square)
    inside |= {"attn_norm": line, "ffn_norm": line}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in inside.items()}
    shapes |= {"token_embd.weight": (rows, size), "output_norm.weight": line}
    tensors = tuple(Stored(name, None, shape, exact=True) for name, shape in shapes.items())
    with ExitStack() as stack:
        nothing = Weights(path.parent, {}, stack)
        kinds = dict.fromkeys(shapes, "F32")
        write_gguf(path, "llama", keys, tensors, kinds, nothing, lambda count: None)
    return LlamaCpp(path, 1)
