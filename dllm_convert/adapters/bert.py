"""Bert: already bidirectional, with a mask token of its own; becomes MDLM."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter

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
    # The pooler and every pretraining head but the masked one.
    unused_tensors=r"bert\.pooler\..*|cls\.(?!predictions\.).*|bert\.embeddings\.position_ids",
)
