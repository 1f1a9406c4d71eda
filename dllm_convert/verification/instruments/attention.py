"""The attention implementations that this machine can run, each lent for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils.import_utils import is_torch_flex_attn_available

from dllm_convert.verification.subject import Subject

IMPLEMENTATIONS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
"""Short name to transformers' name. Flash attention takes no arbitrary mask and no CPU."""


def missing(subject: Subject, name: str) -> str:
    """Return why an implementation cannot run here, empty if it can."""
    if name != "flex":
        found = name in subject.adapter.implementations
        return "" if found else f"{subject.adapter.stock_class} has no {name} attention"
    if subject.adapter.measured is not None:
        return "flex attention is not among what was measured of this family"
    if not is_torch_flex_attn_available():
        return "this torch has no flex attention"
    if not getattr(subject.model, "_supports_flex_attn", False):
        return f"{subject.adapter.stock_class} does not support flex attention"
    return _refusal(subject, name)


@torch.no_grad()
def _refusal(subject: Subject, name: str) -> str:
    """Try a few tokens: flex attention refuses sizes of heads, which ones depends on torch."""
    try:
        with running(subject, name) as model:
            model(subject.tokens(1, min(4, subject.context)), use_cache=False)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"flex attention does not run here ({reason})"
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
