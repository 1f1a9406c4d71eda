"""Qwen3: norms on queries and keys; head_dim independent of the hidden size."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.qwen2 import WINDOW
from dllm_convert.adapters.tensors import ATTENTION_BIASES, QK_NORMS, decoder

ADAPTER = Adapter(
    model_type="qwen3",
    stock_class="Qwen3ForCausalLM",
    diffusion_class="DiffusionQwen3ForCausalLM",
    norm_modules=("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"),
    tensors=decoder(
        inside=QK_NORMS,
        flagged=ATTENTION_BIASES,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
    ),
    window=WINDOW,
)
