"""ModernBERT: already bidirectional, two layers of three see a window; becomes MDLM, as BERT."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter, LocalLayers
from dllm_convert.adapters.tensors import ClassTensors

_NORM, _SQUARE, _MODEL = ("hidden_size",), ("hidden_size",) * 2, "model."

ADAPTER = Adapter(
    model_type="modernbert",
    stock_class="ModernBertForMaskedLM",
    diffusion_class="DiffusionModernBertForMaskedLM",
    auto_class="AutoModelForMaskedLM",
    attention="bidirectional",
    targets=("mdlm",),
    embedding="model.embeddings.tok_embeddings.weight",
    head="decoder.weight",
    head_biases=("decoder.bias",),
    head_required=("head.dense.weight",),
    lora_targets=("Wqkv", "Wo", "Wi", "head.dense"),
    norm_modules=("norm", "attn_norm", "mlp_norm", "final_norm"),
    embedding_module="tok_embeddings",
    head_module="decoder",
    local=LocalLayers(size="local_attention", default=128, every="global_attn_every_n_layers"),
    tensors=ClassTensors(
        prefix="model",
        layers=f"{_MODEL}layers.",
        outside={
            f"{_MODEL}embeddings.tok_embeddings.weight": ("vocab_size", "hidden_size"),
            f"{_MODEL}embeddings.norm.weight": _NORM,
            f"{_MODEL}final_norm.weight": _NORM,
            "head.dense.weight": _SQUARE,
            "head.norm.weight": _NORM,
            "decoder.weight": ("vocab_size", "hidden_size"),
            "decoder.bias": ("vocab_size",),
        },
        inside={
            **{f"{place}_norm.weight": _NORM for place in ("attn", "mlp")},
            "attn.Wqkv.weight": ("queries_keys_values", "hidden_size"),
            "attn.Wo.weight": _SQUARE,
            "mlp.Wi.weight": ("gate_and_up", "hidden_size"),
            "mlp.Wo.weight": ("hidden_size", "intermediate_size"),
        },
        absent=(f"{_MODEL}layers.0.attn_norm.weight",),
        flagged={
            "attention_bias": {"attn.Wqkv.bias": ("queries_keys_values",), "attn.Wo.bias": _NORM},
            "mlp_bias": {"mlp.Wi.bias": ("gate_and_up",), "mlp.Wo.bias": _NORM},
        },
        defaults={
            "vocab_size": 50368,
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "max_position_embeddings": 8192,
        },
        heads_divide=True,
    ),
)
