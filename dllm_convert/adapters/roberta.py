"""Roberta: already bidirectional, with a mask token of its own; becomes MDLM."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.tensors import ENCODER_DEFAULTS, encoder

ADAPTER = Adapter(
    model_type="roberta",
    stock_class="RobertaForMaskedLM",
    diffusion_class="DiffusionRobertaForMaskedLM",
    auto_class="AutoModelForMaskedLM",
    attention="bidirectional",
    # No causal stream to keep clean: without a causal mask between blocks BD3LM is not exact.
    targets=("mdlm",),
    embedding="roberta.embeddings.word_embeddings.weight",
    head="lm_head.decoder.weight",
    head_biases=("lm_head.bias", "lm_head.decoder.bias"),
    head_required=("lm_head.dense.weight",),
    lora_targets=("query", "key", "value", "intermediate.dense", "output.dense"),
    norm_modules=("LayerNorm", "layer_norm"),
    embedding_module="word_embeddings",
    head_module="decoder",
    tensors=encoder(
        "roberta",
        {
            "lm_head.bias": ("vocab_size",),
            "lm_head.dense.weight": ("hidden_size", "hidden_size"),
            "lm_head.dense.bias": ("hidden_size",),
            "lm_head.layer_norm.weight": ("hidden_size",),
            "lm_head.layer_norm.bias": ("hidden_size",),
            "lm_head.decoder.weight": ("vocab_size", "hidden_size"),
            "lm_head.decoder.bias": ("vocab_size",),
        },
        **ENCODER_DEFAULTS,
        vocab_size=50265,
    ),
    positions_after_pad=True,
)
