"""A decoded text for people; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sample_facts(sample: Mapping[str, Any]) -> str:
    """Return how fast a sample was decoded, in words."""
    return f"{sample['tokens_per_forward']:.2f} tokens per forward, {sample['seconds']:.1f} s"
