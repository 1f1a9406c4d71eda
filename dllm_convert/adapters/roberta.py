"""Roberta: already bidirectional, with a mask token of its own; becomes MDLM."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter

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
    unused_tensors=r"roberta\.pooler\..*|roberta\.embeddings\.position_ids",
    positions_after_pad=True,
)
