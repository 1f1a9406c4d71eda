"""Checkpoints of any size that take no disk: real headers, and data that is a hole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.source.safetensors_header import DTYPE_BYTES, INDEX_FILE, encode_header

LLAMA_70B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHARDS = 30


def llama_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, in the order in which they are saved."""
    hidden, inner, rows = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (keys, hidden),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for number in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{number}.{n}.weight": shape for n, shape in layer.items()}
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


def write_giant(
    folder: Path, config: Mapping[str, Any], *, shards: int = SHARDS, dtype: str = "BF16"
) -> int:
    """Write config, index and sparse shards; return the bytes of the tensors."""
    tensors = llama_tensors(config)
    sizes = {}
    for name, shape in tensors.items():
        sizes[name] = DTYPE_BYTES[dtype]
        for length in shape:
            sizes[name] *= length
    total = sum(sizes.values())
    groups: list[list[str]] = [[] for _ in range(shards)]
    before = 0
    for name, size in sizes.items():
        groups[min(before * shards // total, shards - 1)].append(name)
        before += size
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header = encode_header({n: (dtype, tensors[n], sizes[n]) for n in names}, {})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(sizes[n] for n in names))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return total
