"""The attention implementations that this machine can run, each lent for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils.import_utils import is_torch_flex_attn_available

from dllm_convert.verify.subject import Subject

IMPLEMENTATIONS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
"""Short name to transformers' name. Flash attention takes no arbitrary mask and no CPU."""


def missing(subject: Subject, name: str) -> str:
    """Return why an implementation cannot run here, empty if it can."""
    if name != "flex":
        return ""
    if not is_torch_flex_attn_available():
        return "this torch has no flex attention"
    if not getattr(subject.model, "_supports_flex_attn", False):
        return f"{subject.adapter.stock_class} does not support flex attention"
    return ""


@contextmanager
def running(subject: Subject, name: str) -> Iterator[Any]:
    """Lend the model with an attention implementation.

    Flex attention runs uncompiled: the same masks and the same function, without the minute that
    compiling it for every length would take.
    """
    attention = subject.attention(IMPLEMENTATIONS[name])
    with attention as model, torch.compiler.set_stance("force_eager"):
        yield model
