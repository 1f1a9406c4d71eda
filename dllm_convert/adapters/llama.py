"""Llama 2 and 3, SmolLM2 and others of the same architecture."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter

ADAPTER = Adapter(
    model_type="llama",
    stock_class="LlamaForCausalLM",
    diffusion_class="DiffusionLlamaForCausalLM",
    auto_class="AutoModelForCausalLM",
    attention="causal",
    targets=("mdlm", "bd3lm"),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    norm_modules=("input_layernorm", "post_attention_layernorm", "norm"),
    embedding_module="embed_tokens",
    head_module="lm_head",
    reserved_tokens=r"<\|reserved_special_token_\d+\|>",
)
