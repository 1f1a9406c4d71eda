"""Tiny random instances of third-party layouts: the same files and names, nobody's weights or code.

`own_code` writes modelling files of ours that stand in for theirs. Each touches a marker file when
it is imported, so a test can tell whether it ran.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

WEIGHTS = "model.safetensors"
MARKER = "ran"
"""File beside the checkpoint that its code leaves behind."""

A2D = ("a2d-llama", "a2d-qwen2", "a2d-qwen3")
NAMES = (*A2D, "Dream", "LLaDA", "SDAR")


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def add_mask_token(folder: Path, text: str, *, declared: bool = True) -> int:
    """Add a mask token to the tokenizer and return its id; the embedding stays as it is."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    key = "mask_token" if declared else "additional_special_tokens"
    tokenizer.add_special_tokens({key: text if declared else [text]})
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(text))


def make_foreign(make_source: Callable[..., Path], name: str) -> Path:
    """Write a tiny checkpoint of a layout, sound and without code; return its folder."""
    if name in A2D:
        return _a2d(make_source, name)
    return {"Dream": _dream, "LLaDA": _llada, "SDAR": _sdar}[name](make_source)


def _relabel(folder: Path, model_type: str, architecture: str, **fields: Any) -> None:
    def change(config: dict[str, Any]) -> None:
        config |= {"model_type": model_type, "architectures": [architecture], **fields}

    edit_json(folder / "config.json", change)


def _a2d(make_source: Callable[..., Path], name: str) -> Path:
    family = name.removeprefix("a2d-")
    folder = make_source(family, vocab_padding=24)
    add_mask_token(folder, "<|mask|>")
    _relabel(folder, name, f"A2D{family.capitalize()}LMHeadModel")
    return folder


def _sdar(make_source: Callable[..., Path]) -> Path:
    folder = make_source("qwen3", vocab_padding=24)
    mask = add_mask_token(folder, "<|MASK|>")
    _relabel(folder, "sdar", "SDARForCausalLM", mask_token_id=mask)
    return folder


def _dream(make_source: Callable[..., Path]) -> Path:
    """Qwen2's weights, rotary settings in the old place, a slow tokenizer that is code."""
    folder = make_source("qwen2", vocab_padding=24)
    mask = add_mask_token(folder, "<|mask|>")
    _relabel(folder, "Dream", "DreamModel", mask_token_id=mask, rope_theta=10000.0)
    edit_json(folder / "config.json", lambda config: config.pop("rope_parameters"))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    file.unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]
    ]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    added = {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in tokenizer["added_tokens"]
    }
    edit_json(
        folder / "tokenizer_config.json",
        lambda settings: settings.update(
            added_tokens_decoder=added,
            tokenizer_class="DreamTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        ),
    )
    return folder


_LLADA_NAMES = {
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    ".self_attn.o_proj.": ".attn_out.",
    ".self_attn.": ".",
    ".mlp.gate_proj.": ".ff_proj.",
    ".mlp.up_proj.": ".up_proj.",
    ".mlp.down_proj.": ".ff_out.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ff_norm.",
}


def _llada(make_source: Callable[..., Path]) -> Path:
    """Llama's weights under OLMo's names; the mask is in the vocabulary and nowhere declared."""
    folder = make_source("llama", vocab_padding=24)
    mask = add_mask_token(folder, "<|mdm_mask|>", declared=False)
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for stock, own in _LLADA_NAMES.items():
            name = name.replace(stock, own)
        tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    stock = json.loads((folder / "config.json").read_text())
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": stock["hidden_size"],
        "mlp_hidden_size": stock["intermediate_size"],
        "n_layers": stock["num_hidden_layers"],
        "n_heads": stock["num_attention_heads"],
        "n_kv_heads": stock["num_key_value_heads"],
        "max_sequence_length": stock["max_position_embeddings"],
        "vocab_size": stock["vocab_size"],
        "embedding_size": stock["vocab_size"],
        "rms_norm_eps": stock["rms_norm_eps"],
        "rope_theta": stock["rope_parameters"]["rope_theta"],
        "eos_token_id": stock["eos_token_id"],
        "pad_token_id": stock["pad_token_id"],
        "mask_token_id": mask,
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "block_group_size": 1,
        "rope": True,
        "weight_tying": False,
        "include_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_HEAD = """
from pathlib import Path
Path({marker!r}).touch()
import torch
import transformers
from torch import nn
"""

_STOCK = """
class Config(transformers.{family}Config):
    model_type = {model_type!r}

class Model(transformers.{family}ForCausalLM):
    config_class = Config

    def __init__(self, config):
        config.is_causal = {causal}
        super().__init__(config)
"""

# As SDAR's code does, it takes its mask from the caller, without a dimension for heads.
_CALLERS_MASK = """
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        mask = attention_mask[:, None]
        return super().forward(input_ids=input_ids, attention_mask=mask, **kwargs)
"""

# Written from the description of the layout, without transformers' layers: what the mapping to
# Llama is compared with.
_LLADA = """
class Config(transformers.PreTrainedConfig):
    model_type = "llada"

class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

def rotate(x, theta):
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / theta ** (torch.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    sin, cos = angles.sin(), angles.cos()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, size = config, config.d_model
        linear = lambda n, m: nn.Linear(n, m, bias=False)
        pairs = size // config.n_heads * config.n_kv_heads
        self.q_proj, self.attn_out = linear(size, size), linear(size, size)
        self.k_proj, self.v_proj = linear(size, pairs), linear(size, pairs)
        self.ff_proj, self.up_proj = (linear(size, config.mlp_hidden_size) for _ in range(2))
        self.ff_out = linear(config.mlp_hidden_size, size)
        self.attn_norm, self.ff_norm = (Norm(size, config.rms_norm_eps) for _ in range(2))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.config.d_model // self.config.n_heads)).transpose(1, 2)

    def forward(self, x):
        h = self.attn_norm(x)
        q, k, v = (self.heads(p(h)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, self.config.rope_theta), rotate(k, self.config.rope_theta)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.attn_out(a.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))

class Model(transformers.PreTrainedModel):
    config_class = Config
    base_model_prefix = "none"

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": Norm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
        })
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        parts = self.model.transformer
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x = block(x)
        logits = parts["ff_out"](parts["ln_f"](x))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)
"""

_FAMILIES = {
    "a2d-llama": "Llama",
    "a2d-qwen2": "Qwen2",
    "a2d-qwen3": "Qwen3",
    "Dream": "Qwen2",
    "SDAR": "Qwen3",
}


def own_code(folder: Path, name: str, *, causal: bool = False) -> Path:
    """Give a checkpoint code of its own; return the file that appears when the code runs."""
    marker = folder.parent / f"{folder.name}-{MARKER}"
    source = _HEAD.format(marker=str(marker))
    if name == "LLaDA":
        source += _LLADA
    else:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        source += _STOCK.format(family=_FAMILIES[name], model_type=model_type, causal=causal)
    if name == "SDAR" and not causal:
        source += _CALLERS_MASK
    (folder / "modeling_own.py").write_text(source)
    head = "AutoModelForMaskedLM" if name in A2D else "AutoModelForCausalLM"
    auto_map = {"AutoConfig": "modeling_own.Config", head: "modeling_own.Model"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=auto_map))
    if name == "Dream":
        (folder / "tokenization_dream.py").write_text(_HEAD.format(marker=str(marker)))
    return marker
