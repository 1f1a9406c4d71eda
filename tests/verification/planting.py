"""Plant a fault into a converted checkpoint, and see which probes fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dllm_convert.verification import VerificationReport, verify_checkpoint

WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"


def failing_report(folder: Path, groups: Collection[str], **options: Any) -> VerificationReport:
    """Verify, and see to it that a probe fails and says what it measured and required."""
    options.setdefault("untrained", True)
    report = verify_checkpoint(folder, groups=groups, **options)
    assert not report.passed
    assert all(probe.measured and probe.required for probe in report.failed)
    return report


def failed(folder: Path, groups: Collection[str], **options: Any) -> set[str]:
    """Return the names of the probes that fail."""
    return {probe.name for probe in failing_report(folder, groups, **options).failed}


def edit_json(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS
) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
