"""Verification: measure whether a converted checkpoint is what it says it is."""

from __future__ import annotations

from dllm_convert.verify.report import Probe, VerificationReport
from dllm_convert.verify.run import GROUPS, verify_checkpoint

__all__ = ["GROUPS", "Probe", "VerificationReport", "verify_checkpoint"]
