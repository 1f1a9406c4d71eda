"""SDAR: Qwen3's tensors, block diffusion, no token shift.

Source: arXiv 2510.06303, github.com/JetAstra/SDAR (`generate.py` and the modelling file of
SDAR-4B-Chat). Its code takes the block-causal mask from the caller, so the files need not name the
block size; `generate.py` takes 4. The sampler reads the mask's id from the tokenizer.
"""

from __future__ import annotations

from dllm_convert.verification.foreign.layout import ForeignLayout

LAYOUTS = (
    ForeignLayout(
        name="SDAR",
        model_types=("sdar",),
        family="qwen3",
        mask_text="<|MASK|>",
        requires={"hidden_act": ("silu", None)},
        blocks="always",
        default_block_size=4,
        block_mask="3d",
    ),
    ForeignLayout(
        name="SDAR-MoE",
        model_types=("sdar_moe",),
        mask_text="<|MASK|>",
        blocks="always",
        default_block_size=4,
        block_mask="3d",
    ),
)
