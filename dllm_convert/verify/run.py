"""Run all probes on one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.adapters import adapter_of
from dllm_convert.console import Reporter
from dllm_convert.errors import DataError, DllmConvertError, IncompatibleError
from dllm_convert.manifest import MANIFEST_FILE, read_manifest
from dllm_convert.sampling.run import read_config
from dllm_convert.verify.files import check_files
from dllm_convert.verify.influence import check_influence
from dllm_convert.verify.invariance import check_cache, check_padding
from dllm_convert.verify.outcome import check_generate, check_quality
from dllm_convert.verify.parity import check_parity
from dllm_convert.verify.portability import check_portability
from dllm_convert.verify.report import Probe, VerificationReport, skipped
from dllm_convert.verify.subject import Claim, Subject
from dllm_convert.verify.tokens import check_tokens

# What a checkpoint that is not what it seems can raise inside transformers and torch.
_BROKEN = (
    ArithmeticError,
    AttributeError,
    DllmConvertError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
    "base": _Group(check_parity, _LOADED),
    "cache": _Group(check_cache, _LOADED),
    "padding": _Group(check_padding, _LOADED),
    "generate": _Group(check_generate, _LOADED),
    "quality": _Group(check_quality),
}
GROUPS = tuple(_GROUPS)
"""Names of the groups of probes, in the order they run."""


def verify_checkpoint(
    folder: Path,
    *,
    against: Path | None = None,
    quality: Mapping[str, Any] | None = None,
    untrained: bool | None = None,
    groups: Collection[str] = GROUPS,
    reporter: Reporter | None = None,
) -> VerificationReport:
    """Verify a converted checkpoint in float32 on the CPU.

    The folder's own modelling code runs once, in a separate process without secrets.

    Args:
        folder: The checkpoint.
        against: Folder with the base's safetensors weights.
        quality: Held-out measurements; by default those of the manifest.
        untrained: Whether the weights are the base's; by default what the manifest says.
        groups: Which groups of probes to run; the others count as skipped.
        reporter: Progress; by default silent.

    Raises:
        DataError: There is no such folder, or no config in it.
        IncompatibleError: It is not a diffusion checkpoint, or one that contradicts itself.
        UnsupportedError: Its family is not known.
    """
    started = time.monotonic()
    subject = _open(folder, against, quality, untrained)
    reporter = reporter or Reporter(quiet=True)
    probes: list[Probe] = []
    with reporter.task("verify", total=len(_GROUPS)) as task:
        for name, group in _GROUPS.items():
            if name in groups:
                probes += _run(name, group, subject, probes)
            else:
                probes.append(skipped(name, "to be measured", "not asked for"))
            task.advance(note=name)
    return VerificationReport(tuple(probes), round(time.monotonic() - started, 3))


def _open(
    folder: Path,
    against: Path | None,
    quality: Mapping[str, Any] | None,
    untrained: bool | None,
) -> Subject:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder", hint="Give a folder that dllm-convert run wrote"
        )
    config = read_config(folder)
    if "model_type" not in config:
        raise IncompatibleError(f"config.json of {folder} has no model_type")
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else {}
    if untrained is None:
        method = ((manifest.get("recipe") or {}).get("training") or {}).get("method")
        untrained = None if method is None else method == "none"
    return Subject(
        folder=folder,
        config=config,
        adapter=adapter_of(config),
        claim=Claim.from_config(config),
        manifest=manifest,
        against=against,
        quality=quality if quality is not None else manifest.get("measurements") or {},
        untrained=untrained,
    )


def _run(name: str, group: _Group, subject: Subject, before: list[Probe]) -> list[Probe]:
    required = "to be measured"
    failed = [probe.name for probe in before if probe.passed is False and probe.name in group.needs]
    if failed:
        return [skipped(name, required, f"not run: {', '.join(failed)} failed")]
    try:
        return group.run(subject)
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        detail = f"{type(error).__name__}: {reason}"
        return [Probe(name, False, "could not be measured", required, detail)]
