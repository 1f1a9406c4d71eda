"""Qwen2 and Qwen2.5: biases on q, k and v; a sliding window that is usually switched off."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter, Window

ADAPTER = Adapter(
    model_type="qwen2",
    stock_class="Qwen2ForCausalLM",
    diffusion_class="DiffusionQwen2ForCausalLM",
    auto_class="AutoModelForCausalLM",
    attention="causal",
    targets=("mdlm", "bd3lm"),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    norm_modules=("input_layernorm", "post_attention_layernorm", "norm"),
    embedding_module="embed_tokens",
    head_module="lm_head",
    # Layers from max_window_layers on have the window, and only with use_sliding_window.
    window=Window(
        overrides={"use_sliding_window": False, "sliding_window": None},
        default=4096,
        flag="use_sliding_window",
        first_layer="max_window_layers",
        first_layer_default=28,
    ),
)
