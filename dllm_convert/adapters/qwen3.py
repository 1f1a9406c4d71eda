"""Qwen3: norms on queries and keys; head_dim independent of the hidden size."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.qwen2 import WINDOW

ADAPTER = Adapter(
    model_type="qwen3",
    stock_class="Qwen3ForCausalLM",
    diffusion_class="DiffusionQwen3ForCausalLM",
    norm_modules=("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"),
    window=WINDOW,
)
