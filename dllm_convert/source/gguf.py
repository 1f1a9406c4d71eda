"""See a GGUF file as the checkpoint that transformers makes of it when it dequantises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.errors import DataError
from dllm_convert.source.base_card import gguf_base_card
from dllm_convert.source.gguf_header import GgufHeader, read_gguf_header
from dllm_convert.source.info import SourceInfo, TensorInfo, TokenizerInfo
from dllm_convert.source.tokenizer_files import ID_ROLES, build_info, config_ids

CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""Keys behind the name of an architecture, to fields of config.json."""

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_GGML_NAMES = {stock: name for name, stock in _TENSOR_NAMES.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

_NAMED_IDS = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "unknown_token_id": "unk",
    "padding_token_id": "pad",
    "seperator_token_id": "sep",  # spelt so in the format
    "cls_token_id": "cls",
    "mask_token_id": "mask",
}
_SPECIAL_TYPES = frozenset({2, 3, 5})  # unknown, control, unused: never produced by text


def stock_name(name: str) -> str:
    """Return the name of a tensor in a decoder of transformers, or the name itself."""
    stem, dot, suffix = name.rpartition(".")
    block = _BLOCK.fullmatch(stem)
    if block:
        return f"model.layers.{block[1]}.{_TENSOR_NAMES.get(block[2], block[2])}{dot}{suffix}"
    return f"{_TENSOR_NAMES.get(stem, stem)}{dot}{suffix}"


def ggml_name(name: str) -> str:
    """Return the name in a GGUF file of a tensor of a decoder of transformers, or the name itself.

    The inverse of `stock_name`.
    """
    stem, dot, suffix = name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    if layer:
        return f"blk.{layer[1]}.{_GGML_NAMES.get(layer[2], layer[2])}{dot}{suffix}"
    return f"{_GGML_NAMES.get(stem, stem)}{dot}{suffix}"


def _config(header: GgufHeader, architecture: str) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": architecture}
    for key, name in CONFIG_KEYS.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if value is not None:
            config[name] = value
    embedding = header.tensors.get("token_embd.weight")
    if embedding:
        config.setdefault("vocab_size", embedding.shape[0])
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    for key, role in _NAMED_IDS.items():
        value = header.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and role in ID_ROLES:
            config[f"{role}_token_id"] = value
    return config


def _tokenizer(metadata: Mapping[str, Any], config: Mapping[str, Any], name: str) -> TokenizerInfo:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise DataError(
            f"{name}: no tokenizer.ggml.tokens in its metadata, expected a vocabulary",
            hint="Use a GGUF file that carries its tokenizer",
        )
    vocab: dict[str, int] = {}
    for row, text in enumerate(tokens):
        vocab.setdefault(text, row)
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    special = [text for text, kind in zip(tokens, kinds, strict=False) if kind in _SPECIAL_TYPES]
    named = {}
    for key, role in _NAMED_IDS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            named[role] = tokens[token_id]
    templates = [
        str(value) for key, value in metadata.items() if key.startswith("tokenizer.chat_template")
    ]
    return build_info(
        vocab, special=special, named=named, templates=templates, used_ids=config_ids(config)
    )


def _warnings(header: GgufHeader, architecture: str) -> tuple[str, ...]:
    found = []
    kinds = sorted({tensor.kind for tensor in header.tensors.values()} - {"F32", "F16", "BF16"})
    if kinds:
        found.append(
            f"the weights are quantised ({', '.join(kinds)}): the conversion starts from their "
            "dequantised values, which are not the original ones"
        )
    if header.metadata.get(f"{architecture}.attention.causal") is False:
        found.append(
            "the file says that its attention is open, as that of a conversion is: it is taken for "
            "a base all the same. To convert a conversion again, give its folder"
        )
    scaling = header.metadata.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or "rope_freqs.weight" in header.tensors:
        found.append(
            "the file scales its rotary positions, which transformers does not read from GGUF: "
            "prefer the safetensors of this model"
        )
    return tuple(found)


def inspect_gguf(path: Path, given: str) -> SourceInfo:
    """Read what a plan needs from the header of a `.gguf` file.

    Raises:
        DataError: The file is broken or lacks what a checkpoint needs.
    """
    header = read_gguf_header(path)
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise DataError(f"{path.name}: no general.architecture in its metadata, expected a family")
    config = _config(header, architecture)
    tensors = {
        stock_name(name): TensorInfo(tensor.kind, tensor.shape, path.name)
        for name, tensor in header.tensors.items()
    }
    stat = path.stat()
    return SourceInfo(
        given=given,
        kind="gguf",
        path=path,
        repo_id=None,
        revision=None,
        config=config,
        tensors=tensors,
        tokenizer=_tokenizer(header.metadata, config, path.name),
        card=gguf_base_card(header.metadata),
        fingerprint={path.name: f"{stat.st_size}:{stat.st_mtime_ns}"},
        files=(path.name,),
        warnings=_warnings(header, architecture),
    )
