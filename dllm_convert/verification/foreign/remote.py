"""A third-party checkpoint's own code: does it attend as claimed, and compute what ours does?"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from dllm_convert.behaviour.influence import STILL, Pattern
from dllm_convert.errors import DataError
from dllm_convert.verification.probes.gate import FLAG
from dllm_convert.verification.probes.influence import (
    first_wrong,
    probe_columns,
    probe_length,
)
from dllm_convert.verification.probes.portability import run_isolated
from dllm_convert.verification.report import Probe, at_most, largest, skipped

if TYPE_CHECKING:
    from dllm_convert.verification.foreign.probes import Foreign
    from dllm_convert.verification.subject import Subject

SCRIPT = Path(__file__).with_name("_own_code.py")
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")
"""Under which name a folder offers its model with a head; the first it has is taken."""
_ATTENTION, _LOGITS = "own-code-attention", "own-code-logits"


def _auto_class(config: Mapping[str, Any]) -> str | None:
    offered = config.get("auto_map")
    if not isinstance(offered, Mapping):
        return None
    return next((name for name in AUTO_CLASSES if name in offered), None)


def check_own_code(subject: Subject) -> list[Probe]:
    """Return `own-code-attention` and `own-code-logits`; nothing runs without consent."""
    foreign = subject.foreign
    if foreign is None:
        raise ValueError("this checkpoint is one of ours")
    auto_class = _auto_class(foreign.config)
    if auto_class is None:
        return _skipped("the folder brings no code for its model")
    if not subject.trust_remote_code:
        code = str(foreign.config["auto_map"][auto_class]).rpartition(".")[0]
        return _skipped(f"{code}.py was not run: {FLAG} runs it, in a process without secrets")
    length = probe_length(subject)
    columns = probe_columns(length, subject.claim.block_size)
    texts = _texts(subject, length, columns)
    mask = subject.allowed(length)
    try:
        facts, found = _run(foreign, auto_class, {"texts": texts, "mask": mask})
    except DataError as error:
        return [
            Probe(_ATTENTION, False, "does not run", "runs", str(error)),
            skipped(_LOGITS, "no difference", "its own code does not run"),
        ]
    if "absent" in facts:
        return _skipped(f"its code needs what is not installed here: {facts['absent']}")
    return [
        _attention(facts, found, mask[:, columns], columns),
        _logits(subject, foreign, texts[:1], found["logits"]),
    ]


def _skipped(reason: str) -> list[Probe]:
    return [
        skipped(_ATTENTION, "0 pairs wrong", reason),
        skipped(_LOGITS, "no difference", reason),
    ]


def _texts(subject: Subject, length: int, columns: list[int]) -> torch.Tensor:
    """Return a text and, for each column, the text with that token changed, (1 + n, length)."""
    tokens = subject.tokens(1, length)[0]
    texts = tokens.repeat(len(columns) + 1, 1)
    texts[torch.arange(len(columns)) + 1, torch.tensor(columns)] = subject.other_tokens(tokens)[
        torch.tensor(columns)
    ]
    return texts


def _run(
    foreign: Foreign, auto_class: str, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory(prefix="dllm-convert-verify-") as name:
        scratch = Path(name)
        save_file(inputs, scratch / "inputs.safetensors")
        form = foreign.layout.block_mask if foreign.stated.claim.block_size else "none"
        command = [
            *(sys.executable, "-I", str(SCRIPT), str(foreign.folder.resolve()), auto_class, form),
            *(str(scratch / "inputs.safetensors"), str(scratch / "outputs.safetensors")),
        ]
        lines = run_isolated(command, scratch).splitlines()
        facts: dict[str, Any] = json.loads(lines[-1])
        outputs = {} if "absent" in facts else load_file(scratch / "outputs.safetensors")
        return facts, outputs


def _attention(
    facts: Mapping[str, Any],
    found: Mapping[str, torch.Tensor],
    allowed: torch.Tensor,
    columns: list[int],
) -> Probe:
    limit = STILL * float(found["logits"].abs().max())
    pattern = Pattern(found["moved"], allowed, limit, columns)
    wrong = int(pattern.wrong.sum())
    missing = facts["missing"]
    detail = f"loads at random: {missing[0]}" if missing else first_wrong(pattern)
    return Probe(
        _ATTENTION,
        wrong == 0 and not missing,
        f"{wrong} of {allowed.numel()} pairs wrong in {facts['class']}",
        f"0 pairs: closed up to {limit:.2g}, open above",
        detail,
    )


def _logits(subject: Subject, foreign: Foreign, text: torch.Tensor, theirs: torch.Tensor) -> Probe:
    if foreign.unmapped is not None:
        return skipped(_LOGITS, "no difference", foreign.unmapped)
    with torch.no_grad():
        ours = subject.model(text, use_cache=False).logits[0]
    if ours.shape != theirs.shape:
        shapes = f"{tuple(theirs.shape)}, ours {tuple(ours.shape)}"
        return Probe(_LOGITS, False, f"logits have shape {shapes}", "the same shape")
    scale = max(1.0, float(ours.abs().max()))
    return at_most(
        _LOGITS,
        "logits differ from ours by",
        largest([theirs - ours]),
        subject.adapter.tolerance * scale,
    )
