"""Llama 2 and 3, SmolLM2 and others of the same architecture."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter

ADAPTER = Adapter(
    model_type="llama",
    stock_class="LlamaForCausalLM",
    diffusion_class="DiffusionLlamaForCausalLM",
    reserved_tokens=r"<\|reserved_special_token_\d+\|>",
)
