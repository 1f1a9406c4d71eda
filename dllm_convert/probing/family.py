"""Measure one family and say what follows: an adapter, or the reason why there is none."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from dllm_convert.errors import UnsupportedError
from dllm_convert.modeling.loading import BROKEN
from dllm_convert.probing import measure
from dllm_convert.probing.facts import Stored, declare
from dllm_convert.probing.instance import Instance, full_config, stock_name
from dllm_convert.probing.kept import measure_kept
from dllm_convert.probing.report import Finding, ProbeReport

WINDOW_KEYS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
NO_CONTEXT = 1 << 20
"""Size a window is opened to where a config names no longest text."""


def measure_family(
    values: Mapping[str, Any], tensors: Collection[str] | Mapping[str, Stored]
) -> ProbeReport:
    """Measure the family of a checkpoint.

    Args:
        values: Its config.json.
        tensors: Names of its tensors, to types and shapes if these are known; empty if the names
            are not.
    """
    stored = tensors if isinstance(tensors, Mapping) else {}
    started = time.monotonic()
    model_type = str(values.get("model_type"))
    findings: list[Finding] = []
    layers: tuple[str, ...] = ()
    adapter, reason, name = None, None, ""
    try:
        with _refused("its config cannot be read"):
            config = full_config(values)
        name = stock_name(model_type)
        with _refused("no small instance could be built"):
            instance = Instance.of(config)
        layers = instance.kinds
        opened, narrow, targets, kept = _measure(instance, config, findings)
        reason = None if targets or kept else reasons(findings)
        if reason is None:
            adapter = declare(
                config, values, instance, targets, opened, narrow, tensors, stored, kept=kept
            )
    except UnsupportedError as error:
        reason = error.message
    except BROKEN as error:
        reason = f"the opened instance could not be built ({_first_line(error)})"
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    seconds = round(time.monotonic() - started, 2)
    found = tuple(findings)
    return ProbeReport(model_type, name, layers, found, reason, adapter, versions, seconds)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise UnsupportedError(f"{what} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200] if lines else 'no message'}"


def _measure(
    instance: Instance, config: PreTrainedConfig, findings: list[Finding]
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...], bool]:
    """Put every question.

    Returns:
        The opening of windows, what had one, the targets left, and whether a base can stay.
    """
    findings.append(measure.is_causal(instance))
    if not findings[-1].passed:
        return {}, (), (), False
    findings.append(measure.same_logits(instance))
    findings += measure_kept(instance)
    ways = instance.adapter.implementations
    every = torch.ones(measure.LENGTH, measure.LENGTH, dtype=torch.bool)
    opened, narrow, layers = _open_windows(instance, config, every)
    findings.append(layers)
    model = instance.opened(**opened)
    findings += measure.end_to_end(model, every, "open", measure.MDLM, ways)
    findings += [measure.padding(model, measure.MDLM), measure.packing(model)]
    findings += [measure.chosen_logits(model), measure.reload(instance, model)]
    findings.append(measure.gradients(model))
    model = instance.opened(block_size=measure.BLOCK, **opened)
    findings += measure.end_to_end(model, measure.blocks(), "blocks", measure.BD3LM, ways)
    findings.append(
        measure.ask(
            "blocks-layers",
            measure.BD3LM,
            lambda: measure.in_layers(model, measure.blocks(), instance.kinds)[1],
        )
    )
    findings += [measure.padding(model, measure.BD3LM), measure.streams(model)]
    findings.append(measure.cache(model))
    failed = {target for finding in findings if not finding.passed for target in finding.targets}
    left = [target for target in measure.ALL if target not in failed]
    targets = tuple(target for target in measure.BOTH if target in left)
    return opened, narrow, targets, left != list(targets)


def _open_windows(
    instance: Instance, config: PreTrainedConfig, every: torch.Tensor
) -> tuple[dict[str, Any], tuple[str, ...], Finding]:
    """Look into the layers as they are and, where they are narrow, with windows opened.

    The kinds of the layers stay: a family may tie other things to them, such as rotary positions.
    """
    wrong: tuple[int, ...] = ()

    def look(**updates: Any) -> measure.Answer:
        nonlocal wrong
        model = instance.opened(**updates)
        wrong, answer = measure.in_layers(model, every, instance.kinds)
        return answer

    finding = measure.ask("open-layers", measure.MDLM, look)
    context = getattr(config, "max_position_embeddings", None) or NO_CONTEXT
    keys = [key for key in WINDOW_KEYS if isinstance(getattr(config, key, None), int)]
    if finding.passed or not wrong or not keys:
        return {}, (), finding
    narrow = tuple(
        dict.fromkeys(instance.kinds[min(layer, len(instance.kinds) - 1)] for layer in wrong)
    )
    opened = dict.fromkeys(keys, int(context))
    second = measure.ask("open-layers", measure.MDLM, lambda: look(**opened))
    return (opened, narrow, second) if second.passed else ({}, (), finding)


def reasons(findings: Sequence[Finding]) -> str:
    """Say why no objective is left: the first failure of each that is left out."""
    failed = [finding for finding in findings if not finding.passed]
    for finding in failed:
        if set(finding.targets) >= set(measure.BOTH):
            return _say(finding)
    firsts = [next(f for f in failed if target in f.targets) for target in measure.ALL]
    return "; ".join(dict.fromkeys(_say(finding) for finding in firsts))


def _say(finding: Finding) -> str:
    return f"{finding.name}: {finding.measured}" + (f", {finding.detail}" if finding.detail else "")
