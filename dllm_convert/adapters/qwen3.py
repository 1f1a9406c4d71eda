"""Qwen3: norms on queries and keys; head_dim independent of the hidden size."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter, Window

ADAPTER = Adapter(
    model_type="qwen3",
    stock_class="Qwen3ForCausalLM",
    diffusion_class="DiffusionQwen3ForCausalLM",
    auto_class="AutoModelForCausalLM",
    attention="causal",
    targets=("mdlm", "bd3lm"),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    norm_modules=("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"),
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
