"""Influence maps: who sees whom, in the base and in the converted model, over the same text."""

from __future__ import annotations

import math
from typing import Any

import torch

from dllm_convert.behaviour.influence import STILL, measure_influence
from dllm_convert.verification.observe.observations import InfluenceMap
from dllm_convert.verification.subject import Subject

SHORTEST = 32
TOKENS_AT_MOST = 1600
"""Tokens that run for one map: about four seconds of SmolLM2-135M on two cores."""
FEWEST_COLUMNS = 6


def map_grid(block_size: int | None, context: int) -> tuple[int, int]:
    """Return length and stride of a map that shows several blocks, if that is affordable.

    Args:
        block_size: Tokens per block, None for mdlm.
        context: Longest text in tokens.
    """
    size = block_size or SHORTEST
    if block_size is None or 3 * size <= SHORTEST:
        length = SHORTEST // size * size
    elif size <= SHORTEST // 2:
        length = 3 * size
    else:
        length = size // 2 + (2 * size if size <= 2 * SHORTEST else size)
    length = min(length, context)
    for stride in (stride for stride in range(1, size) if size % stride == 0):
        columns = -(-length // stride)
        if columns * length <= TOKENS_AT_MOST or columns <= FEWEST_COLUMNS:
            return length, stride
    return length, size


def influence_map(
    model: Any, tokens: torch.Tensor, other: torch.Tensor, stride: int
) -> InfluenceMap:
    """Change every `stride`-th token and watch the logits.

    Args:
        model: Any model with logits.
        tokens: A text, shape (length,).
        other: What each token is changed to, shape (length,).
        stride: Distance of the tokens that are changed.
    """
    device = getattr(model, "device", tokens.device)
    columns = list(range(0, len(tokens), stride))
    moved, scale = measure_influence(model, tokens.to(device), other.to(device), columns)
    share = (moved.double() / max(scale, 1e-30)).tolist()
    return InfluenceMap(tuple(tuple(_level(value) for value in row) for row in share), stride)


def _level(share: float) -> float | None:
    # The probes' own limit; not-a-number is no influence that could be drawn.
    return round(math.log10(share), 1) if share > STILL else None


def map_of(subject: Subject, model: Any) -> InfluenceMap:
    """Measure who sees whom in a model, over the text on which the subject is shown.

    Args:
        subject: The converted checkpoint.
        model: Its model, or that of its base.
    """
    length, stride = map_grid(subject.claim.block_size, subject.context)
    tokens = subject.tokens(1, length)[0]
    return influence_map(model, tokens, subject.other_tokens(tokens), stride)
