"""Bert: already bidirectional, with a mask token of its own; becomes MDLM."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.tensors import ENCODER_DEFAULTS, encoder

ADAPTER = Adapter(
    model_type="bert",
    stock_class="BertForMaskedLM",
    diffusion_class="DiffusionBertForMaskedLM",
    auto_class="AutoModelForMaskedLM",
    attention="bidirectional",
    # No causal stream to keep clean: without a causal mask between blocks BD3LM is not exact.
    targets=("mdlm",),
    embedding="bert.embeddings.word_embeddings.weight",
    head="cls.predictions.decoder.weight",
    head_biases=("cls.predictions.bias", "cls.predictions.decoder.bias"),
    head_required=("cls.predictions.transform.dense.weight",),
    lora_targets=("query", "key", "value", "intermediate.dense", "output.dense"),
    norm_modules=("LayerNorm",),
    embedding_module="word_embeddings",
    head_module="decoder",
    also_of=("BertForPreTraining",),
    tensors=encoder(
        "bert",
        {
            "cls.predictions.bias": ("vocab_size",),
            "cls.predictions.transform.dense.weight": ("hidden_size", "hidden_size"),
            "cls.predictions.transform.dense.bias": ("hidden_size",),
            "cls.predictions.transform.LayerNorm.weight": ("hidden_size",),
            "cls.predictions.transform.LayerNorm.bias": ("hidden_size",),
            "cls.predictions.decoder.weight": ("vocab_size", "hidden_size"),
            "cls.predictions.decoder.bias": ("vocab_size",),
        },
        **ENCODER_DEFAULTS,
        vocab_size=30522,
    ),
)
