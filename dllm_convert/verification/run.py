"""Run all probes on one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DllmConvertError
from dllm_convert.modeling.loading import BROKEN
from dllm_convert.source.checkpoints import local_checkpoint
from dllm_convert.source.tokenizer_loading import RustErrors
from dllm_convert.verification.accelerator import Accelerator, accelerator_here
from dllm_convert.verification.catalogue import with_origin
from dllm_convert.verification.memory import group_refusal
from dllm_convert.verification.opening import VerificationRequest, opened
from dllm_convert.verification.probes.behind_cache import check_behind_cache
from dllm_convert.verification.probes.decoding import check_generate
from dllm_convert.verification.probes.device import check_device
from dllm_convert.verification.probes.files import check_files
from dllm_convert.verification.probes.gated import check_gated
from dllm_convert.verification.probes.gradient import check_gradient
from dllm_convert.verification.probes.influence import check_influence
from dllm_convert.verification.probes.invariance import check_batch, check_cache, check_padding
from dllm_convert.verification.probes.likelihood import check_likelihood
from dllm_convert.verification.probes.lossless import check_lossless, has_verifier
from dllm_convert.verification.probes.outcome import check_quality
from dllm_convert.verification.probes.parity import check_parity
from dllm_convert.verification.probes.portability import check_portability
from dllm_convert.verification.probes.tokens import check_tokens
from dllm_convert.verification.probes.training_forward import check_training
from dllm_convert.verification.report import Probe, VerificationReport, skipped
from dllm_convert.verification.subject import Subject

_BROKEN = (*BROKEN, DllmConvertError)


@dataclass(frozen=True)
class _Group:
    """Probes that share work.

    Attributes:
        run: Returns the probes.
        needs: Probes without whose success this group would only repeat their failure.
    """

    run: Callable[[Subject], list[Probe]]
    needs: tuple[str, ...] = ()


_WEIGHTS = ("weights", "finite")
_LOADED = (*_WEIGHTS, "tokenizer")
_GROUPS: Mapping[str, _Group] = {
    "files": _Group(check_files),
    "tokens": _Group(check_tokens, ("weights",)),
    "portability": _Group(check_portability, _LOADED),
    "attention": _Group(check_influence, _LOADED),
    "gradient": _Group(check_gradient, _LOADED),
    "training": _Group(check_training, _LOADED),
    "gated": _Group(check_gated, _LOADED),
    "behind": _Group(check_behind_cache, _LOADED),
    "base": _Group(check_parity, _LOADED),
    "cache": _Group(check_cache, _LOADED),
    "padding": _Group(check_padding, _LOADED),
    "batch": _Group(check_batch, _LOADED),
    "generate": _Group(check_generate, _LOADED),
    "lossless": _Group(check_lossless, _LOADED),
    "quality": _Group(check_quality),
    "likelihood": _Group(check_likelihood, _LOADED),
    "device": _Group(check_device, _LOADED),
}
GROUPS = tuple(_GROUPS)
"""Names of the groups of probes, in the order they run; `device` only where there is one, `gated`
and `lossless` only of models that are, or can be; `behind` only where noisy tokens stand behind a
copy of the base's cache, and then instead of those that look at masks."""
_OF_MASKS = frozenset({"attention", "gradient", "training", "cache", "padding"})
"""Groups that look at masks of the conversion's own: where nothing is opened, clean text is the
base's, windows and all, and `gated-base` compares it bit for bit. `device` leaves out those of its
own that do."""


def verify_checkpoint(
    checkpoint: Path | str,
    *,
    revision: str | None = None,
    against: Path | None = None,
    quality: Mapping[str, Any] | None = None,
    untrained: bool | None = None,
    trust_remote_code: bool = False,
    block_size: int | None = None,
    groups: Collection[str] = GROUPS,
    accelerator: Accelerator | None = None,
    reporter: Reporter | None = None,
) -> VerificationReport:
    """Verify a converted checkpoint, or one of a known third-party layout, in float32 on the CPU.

    Where it will be used on another device, or in another type, that is looked at besides.

    Modelling code of the folder runs only if it is the very file this package writes, or with
    `trust_remote_code`; then in a separate process without secrets. What does not fit memory is
    reported as skipped.

    Args:
        checkpoint: A folder or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        against: Folder with the base's safetensors weights.
        quality: Held-out measurements; by default those of the manifest.
        untrained: Whether the weights are the base's; by default what the manifest says.
        trust_remote_code: Whether code of the folder that is not ours may run.
        block_size: Tokens per block of a third-party checkpoint that does not record it.
        groups: Which groups of probes to run; the others count as skipped.
        accelerator: Where it will be used, and in what; by default the GPU of this machine.
        reporter: Progress; by default silent.

    Raises:
        DataError: There is no such folder, or no config in it.
        HubError: The Hub does not have it, refuses it or cannot be reached.
        IncompatibleError: It is not a diffusion checkpoint, or one that contradicts itself.
        UnsupportedError: Its family or layout is not known.
    """
    started = time.monotonic()
    reporter = reporter or Reporter(quiet=True)
    folder = local_checkpoint(checkpoint, revision, reporter)
    asked = VerificationRequest(
        against=against,
        quality=quality,
        untrained=untrained,
        trust_remote_code=trust_remote_code,
        block_size=block_size,
        accelerator=accelerator or accelerator_here(),
    )
    probes: list[Probe] = []
    seconds: dict[str, float] = {}
    with opened(folder, asked) as subject, reporter.task("verify", total=len(_GROUPS)) as task:
        aside = {
            "device": asked.accelerator is None,
            "gated": not subject.claim.is_gated,
            "lossless": not has_verifier(subject),
            "behind": subject.claim.behind != "cache",
        }
        if subject.claim.behind == "cache":
            aside |= dict.fromkeys(_OF_MASKS, True)
        applicable = {n: g for n, g in _GROUPS.items() if not aside.get(n)}
        for name, group in applicable.items():
            if name in groups:
                begun = time.monotonic()
                probes += map(with_origin, _run(name, group, subject, probes))
                seconds[name] = round(time.monotonic() - begun, 3)
            else:
                probes.append(skipped(name, "to be measured", "not asked for"))
            task.advance(1, name)
    return VerificationReport(tuple(probes), round(time.monotonic() - started, 3), seconds)


def _run(name: str, group: _Group, subject: Subject, before: list[Probe]) -> list[Probe]:
    required = "to be measured"
    failed = [probe.name for probe in before if probe.passed is False and probe.name in group.needs]
    if failed:
        return [skipped(name, required, f"not run: {', '.join(failed)} failed")]
    refusal = group_refusal(subject, name)
    if refusal is not None:
        return [skipped(name, required, refusal)]
    run = subject.foreign.group(name, group.run) if subject.foreign else group.run
    try:
        with RustErrors("the tokenizer fails"):
            return run(subject)
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        detail = f"{type(error).__name__}: {reason}"
        return [Probe(name, False, "could not be measured", required, detail)]
