"""Mistral 7B: v0.1 has a sliding window on every layer, later ones have none."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter, Window

ADAPTER = Adapter(
    model_type="mistral",
    stock_class="MistralForCausalLM",
    diffusion_class="DiffusionMistralForCausalLM",
    # `[control_N]` in the SentencePiece vocabularies (v2, v3), `<SPECIAL_N>` in tekken.
    reserved_tokens=r"\[control_\d+\]|<SPECIAL_\d+>",
    # A config.json that leaves sliding_window out means 4096, so null has to be written.
    window=Window(overrides={"sliding_window": None}, default=4096),
)
