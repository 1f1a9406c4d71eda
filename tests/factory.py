"""Tiny checkpoints of every family: random weights, tokenizers trained here, saved as usual."""

from __future__ import annotations

import json
import pydoc
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 256
INIT_RANGE = 0.2
"""Ten times the usual value, so that one changed token visibly moves every logit it reaches."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def prose(limit: int = 400) -> list[str]:
    """Return paragraphs of the language reference that ships with CPython."""
    text = "\n\n".join(pydoc.plain(str(body)) for _, body in sorted(topics.topics.items()))
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return [part for part in paragraphs if len(part) > 80][:limit]


def _byte_level(vocab_size: int, special: list[str], *, prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose(), trainer)
    return tokenizer


def _with_names_of_bert(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=CONTEXT,
    )


def _bert_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(prose(), trainer)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    return _with_names_of_bert(tokenizer)


def _roberta_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = _byte_level(400, special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=CONTEXT,
    )


def _modernbert_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level as GPT-NeoX's, with BERT's special tokens."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    tokenizer = _byte_level(400, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return _with_names_of_bert(tokenizer)


def _decoder_tokenizer(
    special: list[str], *, chat: bool = False, bos: bool = True
) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(384, special)
    names: dict[str, str] = {"eos_token": special[1], "pad_token": special[1]}
    if bos:
        names["bos_token"] = special[0]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{special[0]} $A",
                    pair=f"{special[0]} $A {special[0]} $B",
                    special_tokens=[(special[0], 0)],
                ),
            ]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **names,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    return _decoder_tokenizer(["<|begin|>", "<|end|>", "<|start|>"], chat=True)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _decoder_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], chat=False, bos=False
    )


def _mistral_tokenizer() -> PreTrainedTokenizerFast:
    return _decoder_tokenizer(["<s>", "</s>", "<unk>"])


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bert": _bert_tokenizer,
    "roberta": _roberta_tokenizer,
    "llama": _llama_tokenizer,
    "modernbert": _modernbert_tokenizer,
    "qwen2": _qwen_tokenizer,
    "qwen3": _qwen_tokenizer,
    "mistral": _mistral_tokenizer,
}

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "tie_word_embeddings": True,
}
_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    # RoBERTa counts positions from pad_token_id + 1.
    "roberta": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**_ENCODER, "max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1},
    ),
    # Of two layers one is local; what is further away than 8 tokens it does not see.
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "mlp_dropout": 0.1,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {k: v for k, v in _DECODER.items() if k != "head_dim"},
    ),
    # heads * head_dim differs from hidden_size, as in Qwen3-0.6B.
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": None}),
}
"""Family to (config class, model class, fields): the tiny config a registered adapter must have."""


def make_config(
    family: str, tokenizer: PreTrainedTokenizerFast, **overrides: Any
) -> PreTrainedConfig:
    """Build the tiny config of `family` for `tokenizer`, with `overrides` on top."""
    config_class, model_class, fields = FAMILIES[family]
    values: dict[str, Any] = {
        "num_hidden_layers": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": INIT_RANGE,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "architectures": [model_class],
    }
    config: PreTrainedConfig = getattr(transformers, config_class)(
        **{**values, **fields, **overrides}
    )
    return config


def make_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Build a random model whose biases and norms are not at their neutral values."""
    model_class = FAMILIES[config.model_type][1]
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _reshard(folder: Path, shards: int) -> None:
    """Split model.safetensors into exactly `shards` files with an index, as transformers does."""
    single = folder / "model.safetensors"
    with safe_open(single, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    single.unlink()
    names = list(tensors)
    per_shard = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {
            name: tensors[name] for name in names[number * per_shard : (number + 1) * per_shard]
        }
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(t.numel() * t.element_size() for t in tensors.values())
    total_parameters = sum(t.numel() for t in tensors.values())
    index: Mapping[str, Any] = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_source(
    folder: Path,
    family: str,
    *,
    tied: bool | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    vocab_padding: int = 0,
    layers: int = 2,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a tiny checkpoint of `family` with its tokenizer and return `folder`.

    Args:
        folder: Where to write; created if absent.
        family: A key of `FAMILIES`.
        tied: Whether head and embedding share weights; None is the family's usual.
        shards: Number of safetensors files.
        dtype: Type of the weights in the file.
        vocab_padding: Rows of the embedding beyond the tokenizer's last id.
        layers: Number of Transformer layers.
        seed: Seed of the weights.
        **config: Any other config field.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZERS[family]()
    config = {"num_hidden_layers": layers, "vocab_size": len(tokenizer) + vocab_padding, **config}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    model = make_model(make_config(family, tokenizer, **config), seed=seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shards > 1:
        _reshard(folder, shards)
    (folder / "LICENSE").write_text("Test licence: do as you like.\n")
    return folder
