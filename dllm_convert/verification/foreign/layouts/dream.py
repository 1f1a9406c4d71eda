"""Dream 7B and models of its class (DiffuCoder): Qwen2's tensors, bidirectional, token shift kept.

Source: arXiv 2508.15487, github.com/DreamLM/Dream and the modelling file published with the
weights: `DreamModel` has Qwen2's projections with their biases, ignores the sliding window, and its
sampler moves the logits by one position. Its tokenizer is a copy of Qwen2's that is written in the
folder, so it is code too. Later models of the same model_type decode in blocks; a `block_size` in
the config tells them apart, and nothing is assumed of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.verification.foreign.layout import ForeignLayout

# Where DreamConfig's defaults differ from those of Qwen2Config.
_DEFAULTS = {"num_key_value_heads": 32, "intermediate_size": 22016, "mask_token_id": 151666}


def _stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return _DEFAULTS | dict(config)


LAYOUTS = (
    ForeignLayout(
        name="Dream",
        model_types=("Dream",),
        architectures=("DreamModel",),
        family="qwen2",
        mask_text="<|mask|>",
        requires={"block_size": (None,), "hidden_act": ("silu", None), "use_mrope": (False, None)},
        stock_config=_stock_config,
        token_shift=True,
        tokenizer_class="Qwen2Tokenizer",
    ),
)
