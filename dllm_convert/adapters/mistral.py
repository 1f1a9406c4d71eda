"""Mistral 7B: v0.1 has a sliding window on every layer, later ones have none."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter, SlidingWindow
from dllm_convert.adapters.tensors import decoder

ADAPTER = Adapter(
    model_type="mistral",
    stock_class="MistralForCausalLM",
    diffusion_class="DiffusionMistralForCausalLM",
    tensors=decoder(
        nullable=("head_dim",),
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    # `[control_N]` in the SentencePiece vocabularies (v2, v3), `<SPECIAL_N>` in tekken.
    reserved_tokens=r"\[control_\d+\]|<SPECIAL_\d+>",
    # A config.json that leaves sliding_window out means 4096, so null has to be written.
    window=SlidingWindow(overrides={"sliding_window": None}, default=4096),
)
