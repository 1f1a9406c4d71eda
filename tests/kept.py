"""Small random models whose base stays, and whose noisy tokens stand behind a copy of its cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from dllm_convert.probing.instance import Instance

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
_WINDOW = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2

KEPT: dict[str, dict[str, Any]] = {
    "llama": {},
    # Sliding windows, which roll back; two embeddings of every token in the second.
    "gemma3_text": {"layer_types": _WINDOW, "sliding_window": 8},
    "gemma4_text": {"layer_types": _WINDOW, "sliding_window": 8},
    # Convolutions, which roll back.
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    # Recurrent states, which do not.
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_next": {"layer_types": _LINEAR, "num_experts": 4},
    "olmo_hybrid": {"layer_types": _LINEAR},
    "nemotron_h": {},
    "falcon_h1": {},
}
"""Family to what its small config says besides."""
RECURRENT = ("qwen3_5_text", "qwen3_next", "olmo_hybrid", "nemotron_h", "falcon_h1")


def instance(family: str, **fields: Any) -> Instance:
    """Return a family in small, of float32."""
    transformers.logging.set_verbosity_error()
    own = {} if family in ("nemotron_h", "falcon_h1") else {**_SMALL}
    values = {**own, **KEPT[family], **fields}
    torch.manual_seed(0)
    return Instance.of(CONFIG_MAPPING[family](**values))


def texts(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts padded on the left, and 1 at their tokens, each (rows, longest)."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(16, 90, (len(lengths), max(lengths)), generator=draws)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()
