"""Whether a checkpoint fits memory, decided from headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from dllm_convert.behaviour.influence import TOKENS_AT_ONCE
from dllm_convert.common.memory import available_bytes, in_words
from dllm_convert.errors import DataError
from dllm_convert.source.safetensors_header import Header

if TYPE_CHECKING:
    from dllm_convert.verification.subject import Subject

WITHOUT_MODEL = frozenset({"files", "tokens", "quality"})
"""Groups of probes that read headers, or one tensor at a time."""
_ONE_MODEL = frozenset({"attention", "gradient", "training"})
"""Groups that hold one model; the others hold a second beside it, or the first in float64."""
_FLOAT32 = 4
_LOGIT_TENSORS = 3
"""Tensors of the size of the logits that a probe holds at once: text, changed text, difference."""


def _too_large(what: str, needed: int) -> str | None:
    free = available_bytes()
    if needed <= free:
        return None
    return f"{what} needs {in_words(needed)} of memory, {in_words(free)} are free"


def group_refusal(subject: Subject, group: str) -> str | None:
    """Return why a group of probes cannot run in this memory, None if it can.

    The model is loaded in float32; one that an earlier group loaded is counted as free of charge.
    """
    if group in WITHOUT_MODEL:
        return None
    try:
        headers = subject.headers
    except DataError:
        return None  # the probe `weights` says what is wrong with them
    rows = (subject.shapes.get(subject.adapter.embedding) or (0,))[0]
    copies = (1 if group in _ONE_MODEL else 2) - ("model" in vars(subject))
    return model_refusal(headers, copies=copies, rows=rows)


def model_refusal(headers: Mapping[str, Header], *, copies: int, rows: int = 0) -> str | None:
    """Return why a model cannot be held in float32, None if it can.

    Args:
        headers: Headers of its weights.
        copies: How many times it is held at once.
        rows: Tokens of the vocabulary, for the logits.
    """
    return _too_large(
        "the model in float32", model_bytes(headers, _FLOAT32, copies=copies, rows=rows)
    )


def model_bytes(
    headers: Mapping[str, Header], itemsize: int, *, copies: int = 1, rows: int = 0
) -> int:
    """Return what a model and the logits of a probe take.

    Args:
        headers: Headers of its weights.
        itemsize: Bytes of a number.
        copies: How many times it is held at once.
        rows: Tokens of the vocabulary, for the logits.
    """
    shapes = (entry.shape for header in headers.values() for entry in header.entries.values())
    logits = _LOGIT_TENSORS * TOKENS_AT_ONCE * rows
    return (copies * sum(map(prod, shapes)) + logits) * itemsize


def tensor_refusal(headers: Mapping[str, Header]) -> str | None:
    """Return why the tensors cannot be read one at a time, None if they can."""
    sizes = {
        name: entry.end - entry.start
        for header in headers.values()
        for name, entry in header.entries.items()
    }
    name = max(sizes, key=sizes.__getitem__, default=None)
    return None if name is None else _too_large(f"tensor {name} alone", sizes[name])
