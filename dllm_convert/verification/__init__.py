"""Verification: measure whether a converted checkpoint is what it says it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dllm_convert.verification.report import Probe, VerificationReport

if TYPE_CHECKING:
    from dllm_convert.verification.run import GROUPS, verify_checkpoint

__all__ = ["GROUPS", "Probe", "VerificationReport", "verify_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: `verify.bytes` does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dllm_convert.verification import run

    return getattr(run, name)
