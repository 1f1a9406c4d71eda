"""Portability: alone in a fresh process with stock transformers, it is the same model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from safetensors.torch import load_file, save_file

from dllm_convert.adapters import Adapter
from dllm_convert.common.secrets_found import without_secrets
from dllm_convert.errors import DataError
from dllm_convert.verification.probes.gate import FLAG, strange_code
from dllm_convert.verification.probes.influence import probe_length
from dllm_convert.verification.report import Probe, first_items, largest, skipped
from dllm_convert.verification.subject import Subject

SCRIPT = Path(__file__).with_name("_fresh_process.py")
TIMEOUT_S = 1800
MAX_LENGTH = 48


def check_portability(subject: Subject) -> list[Probe]:
    """Return the probes `portable`, `portable-stock` and `portable-version`.

    The first loads the folder's own code, the second the stock class, which is given the 4-D mask
    where attention is block-causal, the third runs the code under a transformers that is too old.
    Code that this version did not write needs consent.
    """
    strange = None
    if not subject.trust_remote_code:
        strange = strange_code(subject.folder, subject.config, subject.adapter)
    length = min(probe_length(subject), max(MAX_LENGTH, (subject.claim.block_size or 0) + 1))
    tokens = subject.tokens(1, min(length, subject.context))
    try:
        facts, logits = _fresh_process(subject, tokens, own_code=strange is None)
    except DataError as error:
        return [Probe("portable", False, "does not load", "loads", str(error))]
    with torch.no_grad():
        ours = subject.model(tokens, use_cache=False).logits
    adapter = subject.adapter
    stock = _compare(subject, "portable-stock", facts, logits, ours, adapter.stock_class)
    if strange is not None:
        reason = f"{strange}; {FLAG} runs it, in a process without secrets"
        return [
            skipped("portable", f"at most {adapter.tolerance:g}", reason),
            stock,
            skipped("portable-version", f"at least {adapter.min_transformers}", reason),
        ]
    return [
        _compare(subject, "portable", facts, logits, ours, adapter.diffusion_class),
        stock,
        judge_version(adapter, facts["remote"]),
    ]


def judge_version(adapter: Adapter, found: Mapping[str, Any]) -> Probe:
    """Return the probe `portable-version`.

    Args:
        adapter: The family.
        found: What the modelling code states as its `minimum`, the `older` release it was run
            under, and its `refusal`.
    """
    needed = adapter.min_transformers
    stated, refusal = found["minimum"], str(found["refusal"])
    wrong: list[str] = []
    if stated is None:
        wrong.append("the modelling code states no minimum")
    elif not _is_version(stated) or Version(stated) < Version(needed):
        wrong.append(f"the modelling code asks for {stated} only")
    if not refusal:
        wrong.append(f"transformers {found['older']} is let through, and runs the model causal")
    elif stated is not None and stated not in refusal:
        wrong.append(f"the refusal does not say what is needed: {refusal.splitlines()[0]}")
    return Probe(
        "portable-version",
        not wrong,
        f"asks for transformers {stated}, {'refuses' if refusal else 'takes'} {found['older']}",
        f"at least {needed}, refuses older ones by name",
        first_items(wrong),
    )


def _is_version(text: object) -> bool:
    try:
        Version(str(text))
    except InvalidVersion:
        return False
    return True


def _compare(
    subject: Subject,
    name: str,
    facts: dict[str, Any],
    logits: dict[str, torch.Tensor],
    ours: torch.Tensor,
    class_name: str,
) -> Probe:
    key = "stock" if name.endswith("stock") else "remote"
    found = facts[key]
    same_shape = logits[key].shape == ours.shape
    difference = largest([logits[key] - ours]) if same_shape else math.inf
    wrong: list[str] = []
    if found["class"] != class_name:
        wrong.append(f"loads as {found['class']}")
    if found["missing"] or found["mismatched"]:
        wrong.append(f"loads at random: {[*found['missing'], *found['mismatched']][0]}")
    if found["unexpected"]:
        wrong.append(f"holds {found['unexpected'][0]}, which {found['class']} does not know")
    if facts["mask_token_id"] != subject.claim.mask_token_id:
        wrong.append(f"its tokenizer has mask id {facts['mask_token_id']}")
    tolerance = subject.adapter.tolerance
    return Probe(
        name,
        not wrong and difference <= tolerance,
        f"logits differ by {difference:.3g}",
        f"at most {tolerance:g}, as {class_name}",
        "; ".join(wrong),
    )


def _environment(scratch: Path) -> dict[str, str]:
    """Return the process's environment: offline, no cache but its own, and no secret to leak."""
    return without_secrets(os.environ) | {
        "HF_HOME": str(scratch / "home"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def run_isolated(command: list[str], scratch: Path) -> str:
    """Run a script in a process without secrets, network or caches, and return its stdout.

    Args:
        command: Program and arguments.
        scratch: Folder it may write to.

    Raises:
        DataError: The process failed; the message is its last line.
    """
    try:
        result = subprocess.run(
            command,
            cwd=scratch,
            env=_environment(scratch),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"the fresh process did not finish in {TIMEOUT_S} s") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no message"
        raise DataError(f"the fresh process ended with code {result.returncode}: {last}")
    return result.stdout


def _fresh_process(
    subject: Subject, tokens: torch.Tensor, *, own_code: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run the script beside this module; return its facts and the logits of its loads.

    Raises:
        DataError: The process failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory(prefix="dllm-convert-verify-") as name:
        scratch = Path(name)
        inputs = {"input_ids": tokens}
        if subject.claim.block_size and subject.claim.behind == "mask":
            mask = subject.allowed(tokens.shape[1])[None, None].contiguous()
            if subject.adapter.implementations[0] == "eager":
                # Eager attention adds its mask to the scores.
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            inputs["attention_mask"] = mask
        save_file(inputs, scratch / "inputs.safetensors")
        command = [
            *(sys.executable, "-I", str(SCRIPT), str(subject.folder.resolve())),
            *(subject.adapter.auto_class, str(scratch / "inputs.safetensors")),
            *(str(scratch / "outputs.safetensors"), "own-code" if own_code else "stock"),
        ]
        stdout = run_isolated(command, scratch)
        facts: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        return facts, load_file(scratch / "outputs.safetensors")
