"""Qwen2 and Qwen2.5: biases on q, k and v; a sliding window that is usually switched off."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter, SlidingWindow
from dllm_convert.adapters.tensors import QKV_BIASES, decoder

# Layers from max_window_layers on have the window, and only with use_sliding_window.
WINDOW = SlidingWindow(
    overrides={"use_sliding_window": False, "sliding_window": None},
    default=4096,
    flag="use_sliding_window",
    first_layer="max_window_layers",
    first_layer_default=28,
)

ADAPTER = Adapter(
    model_type="qwen2",
    stock_class="Qwen2ForCausalLM",
    diffusion_class="DiffusionQwen2ForCausalLM",
    tensors=decoder(
        inside=QKV_BIASES,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
    ),
    window=WINDOW,
)
