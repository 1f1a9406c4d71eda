"""A decoded text for people; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sample_facts(sample: Mapping[str, Any]) -> str:
    """Return how fast a sample was decoded, in words."""
    said = f"{sample['tokens_per_forward']:.2f} tokens per forward, {sample['seconds']:.1f} s"
    if sample.get("close") is None:
        return said
    near = f", {sample['close']} of them close calls" if sample["close"] else ""
    return f"{said}; lossless: every token is the verifier's{near}"
