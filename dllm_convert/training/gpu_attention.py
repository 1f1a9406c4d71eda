"""Flex attention in training on a GPU: blocks that nobody sees into are skipped.

transformers has an attention of that name. It hands queries and keys on in float32 and values in
bfloat16 where norms or rotations leave them so under autocast, which torch before 2.11 refuses or
computes in float32; it copies keys and values for every query head where those are no power of two;
and it asks for each softmax's sum, which nobody reads here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask

FLEX = "dllm_flex"
"""Name of this attention in transformers; its masks are block masks."""


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., torch.Tensor]:
    # Once for the process: uncompiled it computes every pair, in float32.
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention)
    return compiled


def flexible_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers' layers call it; what asks for more than a mask goes to theirs.

    Args:
        module: The attention layer.
        query: Shape (batch, heads, queries, width).
        key: Shape (batch, kv heads, keys, width); heads are a multiple of kv heads.
        value: The same.
        attention_mask: A `BlockMask`.
        scaling: What scores are multiplied with.
        **kwargs: What else the layer says.

    Returns:
        Shape (batch, queries, heads, width), of the type of `value`, and no weights.
    """
    known = all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
    if kwargs.get("dropout") or not known or not isinstance(attention_mask, BlockMask):
        theirs: tuple[torch.Tensor, torch.Tensor | None] = flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return theirs
    compiling = torch.compiler.is_compiling()
    attend: Any = flex_attention if compiling else _compiled()
    result = attend(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.transpose(1, 2).contiguous(), None


def register_flex() -> str:
    """Make the implementation known to transformers, and return its name there."""
    AttentionInterface.register(FLEX, flexible_attention)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)
    return FLEX
