"""Llama 2 and 3, SmolLM2 and others of the same architecture."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.tensors import ATTENTION_BIASES, MLP_BIASES, decoder

ADAPTER = Adapter(
    model_type="llama",
    stock_class="LlamaForCausalLM",
    diffusion_class="DiffusionLlamaForCausalLM",
    tensors=decoder(
        flagged={**ATTENTION_BIASES, **MLP_BIASES},
        nullable=("num_key_value_heads", "head_dim"),
        heads_divide=True,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    ),
    reserved_tokens=r"<\|reserved_special_token_\d+\|>",
)
