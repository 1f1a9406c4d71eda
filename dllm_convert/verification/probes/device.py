"""The device that will be used: its kernels, in the type that the weights are held in there.

What is exact stays exact in any type: a closed pair has weight 0, so it moves nothing and its
derivative is 0. What agrees but for rounding is held to the rounding itself, which is measured:
what the type alone does to the model on the CPU, in attention written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dllm_convert.behaviour.influence import Pattern, equal_rows
from dllm_convert.common.memory import free_memory, in_words
from dllm_convert.diffusion.attention import TILE
from dllm_convert.diffusion.corruption import NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import measured_process
from dllm_convert.diffusion.prediction import predict
from dllm_convert.diffusion.streams import WIDTH_MULTIPLE
from dllm_convert.planning.estimate import has_flex
from dllm_convert.training.cpu_attention import register_tiles
from dllm_convert.training.gpu_attention import FLEX, register_flex
from dllm_convert.verification.accelerator import HOST, Accelerator
from dllm_convert.verification.memory import model_bytes
from dllm_convert.verification.probes.decoding import check_generate
from dllm_convert.verification.probes.gradient import end_to_end as differentiate
from dllm_convert.verification.probes.gradient import measure_gradient
from dllm_convert.verification.probes.influence import end_to_end, pattern_probe, probe_length
from dllm_convert.verification.probes.invariance import check_cache, check_padding, with_neighbours
from dllm_convert.verification.probes.lossless import check_near, has_verifier
from dllm_convert.verification.probes.training_forward import (
    claimed_mask,
    observe_training,
    packed_row,
    told_of_noise,
)
from dllm_convert.verification.report import Probe, at_most, largest, none_wrong, skipped
from dllm_convert.verification.subject import SEED, Subject

ROUNDINGS = 4.0
"""How many times the type's own rounding two passes may differ by: each of them is rounded, and the
largest of a few thousand differences is compared with the largest of as many."""
MOST = 0.5
"""Share of the largest logit that is no rounding, whatever the type does on the CPU."""


def check_device(subject: Subject) -> list[Probe]:
    """Return the probes of `catalogue.DEVICE`; none where the CPU is what will be used.

    Of a model that holds a verifier also `device-lossless`; where noisy tokens stand behind a copy
    of the base's cache none of those that look at masks.
    """
    accelerator = subject.accelerator
    if accelerator is None:
        return []
    refusal = _too_large_for(subject, accelerator)
    if refusal is not None:
        return [skipped("device", "to be measured", refusal)]
    try:
        probes = _probes(subject, accelerator)
    finally:
        free_memory()
    return [
        probe
        if probe.passed is None
        else replace(probe, measured=f"{accelerator}: {probe.measured}")
        for probe in probes
    ]


def _too_large_for(subject: Subject, accelerator: Accelerator) -> str | None:
    """Return why the device cannot hold the model, None if it can."""
    if not accelerator.device.startswith("cuda"):
        return None
    rows = subject.shapes[subject.adapter.embedding][0]
    needed = model_bytes(subject.headers, accelerator.torch_dtype.itemsize, rows=rows)
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    if needed <= free:
        return None
    return (
        f"the model in {accelerator.dtype} needs {in_words(needed)} of {accelerator.device}, "
        f"{in_words(free)} are free"
    )


def _probes(subject: Subject, accelerator: Accelerator) -> list[Probe]:
    there, rounding = _placed(subject, accelerator)
    most = MOST * float(rounding.exact.abs().max())
    limit = max(subject.adapter.tolerance, min(ROUNDINGS * rounding.alone, most))
    allowed_for = f"{ROUNDINGS:g} times what {accelerator.dtype} alone does to the logits"

    def judge(_: Subject, name: str, measure: Callable[[], float], first: float | None) -> Probe:
        found = measure() if first is None else first
        return at_most(name, "logits differ by", found, limit, detail=allowed_for)

    with torch.no_grad():
        logits = judge(there, "logits", partial(rounding.on, there), None)
        neighbours = judge(there, "batch", partial(with_neighbours, there), None)
    probes = [logits]
    # Where nothing is opened there is no mask of the conversion's own to look at.
    if there.claim.behind == "mask":
        probes += [
            _influence(there),
            differentiate(there, "gradient"),
            *_training(there),
            *check_cache(there, judge),
            *check_padding(there, judge),
        ]
    probes += [neighbours, *check_generate(there, others=False)]
    if has_verifier(there):
        probes += check_near(there, limit)
    return [replace(probe, name=f"device-{probe.name}") for probe in probes]


@dataclass(frozen=True)
class _Rounding:
    """What a type does to the logits of a text.

    Attributes:
        tokens: The text, shape (rows, length), on the CPU.
        exact: Its logits in float32, on the CPU.
        alone: By how much those in the type differ on the CPU.
    """

    tokens: torch.Tensor
    exact: torch.Tensor
    alone: float

    def on(self, there: Subject) -> float:
        """Return by how much those of the device differ."""
        found = there.model(self.tokens.to(there.runs_on.device), use_cache=False).logits
        return largest([found.float().cpu() - self.exact])


@torch.no_grad()
def _placed(subject: Subject, accelerator: Accelerator) -> tuple[Subject, _Rounding]:
    """Return the checkpoint on its device, and what its type does without the device.

    It is loaded once, on the CPU, and goes over when it has been read there.
    """
    tokens = subject.tokens(2, min(probe_length(subject), 48))
    exact = subject.model(tokens, use_cache=False).logits
    there = replace(subject, runs_on=Accelerator(HOST.device, accelerator.dtype))
    # Another kernel than the one that is looked at, where there is one.
    written_out = "eager" if "eager" in subject.adapter.implementations else None
    with there.attention(written_out or subject.adapter.implementations[0]) as model:
        alone = largest([model(tokens, use_cache=False).logits.float() - exact])
    there.runs_on = accelerator
    there.model.to(accelerator.device)
    return there, _Rounding(tokens, exact, alone)


def _influence(there: Subject) -> Probe:
    floor = equal_rows(there.model, there.tokens(1, probe_length(there))[0])
    found = end_to_end(there, there.model)
    wrong = [_leaks(pattern, floor) for pattern in found.values()]
    firsts = (
        f"{pattern.first_wrong(leaks)} ({length} tokens)"
        for (length, pattern), leaks in zip(found.items(), wrong, strict=True)
        if leaks.any()
    )
    return _still("attention", list(found.values()), wrong, floor, next(firsts, ""))


def _leaks(pattern: Pattern, floor: float) -> torch.Tensor:
    """Return where something moves that is closed; not-a-number is wrong everywhere."""
    return (pattern.moved > floor) & ~pattern.allowed | pattern.moved.isnan()


def _still(
    name: str, found: list[Pattern], wrong: list[torch.Tensor], floor: float, detail: str
) -> Probe:
    """Judge closed pairs only: a type may round a weak influence to nothing, and never adds one.

    Whether open pairs are open is asked by the gradient, which nothing rounds away.

    Args:
        name: Name of the probe.
        found: What was measured.
        wrong: What of it is wrong.
        floor: By how much equal rows of one batch differ.
        detail: The first that is wrong.
    """
    leaks, pairs = sum(int(w.sum()) for w in wrong), sum(int((~p.allowed).sum()) for p in found)
    if not pairs and not leaks:
        return skipped(name, "0 closed pairs move", "mdlm closes no pair")
    worst = max(pattern.worst_forbidden for pattern in found)
    return Probe(
        name,
        none_wrong(leaks, pairs),
        f"{leaks} of {pairs} closed pairs move, by {worst:.2g}",
        f"0 pairs by more than {floor:.2g}, as equal rows do",
        detail,
    )


def _training(there: Subject) -> list[Probe]:
    """Look at the forward that trains, with the attention that trains there."""
    names, objective = ("training", "training-gradient"), there.objective
    # Laid out on the CPU, as in training.
    batch = packed_row(replace(there, runs_on=HOST), objective)
    if batch is None:
        reason = f"a context of {there.context} tokens has no room for two documents"
        return [skipped(name, "0 pairs wrong", reason) for name in names]
    attention = _training_attention(there)
    (noise,) = corrupt(
        batch, objective, measured_process(objective), NoiseKey(SEED, 0, 0, 1, "verify")
    )
    multiple = TILE if attention == FLEX else WIDTH_MULTIPLE
    laid_out = predict(batch, [noise], objective, multiple=multiple)
    forward = laid_out.to(torch.device(there.runs_on.device))
    if laid_out.mask is None:
        return [Probe(names[0], False, "no mask for two documents", "0 pairs wrong")]
    mask = forward.block_mask() if attention == FLEX else forward.dense_mask()
    with there.attention(attention) as model:
        settings = {"attention_mask": mask, "position_ids": forward.inputs["position_ids"]}
        settings |= told_of_noise(forward)
        bound, tokens = partial(model, **settings), forward.inputs["input_ids"][0]
        floor = equal_rows(bound, tokens)
        pattern, describe = observe_training(there, forward, laid_out.mask, objective, mask)
        embedded = _embedded(model, tokens, told_of_noise(forward).get("noisy"))
        depends = measure_gradient(bound, embedded, pattern.columns)
    leaks = _leaks(pattern, floor)
    found = _still(names[0], [pattern], [leaks], floor, describe(leaks))
    # The same positions, now those that look; what nobody sees is no token of theirs.
    real = pattern.rows or []
    allowed = claimed_mask(laid_out.mask, objective)[pattern.columns]
    gradient = Pattern(depends[:, real], allowed[:, real], 0.0, real, pattern.columns)
    both = [found, pattern_probe(names[1], {len(tokens): gradient})]
    return [replace(probe, measured=f"{probe.measured}, with {attention}") for probe in both]


@torch.no_grad()
def _embedded(model: Any, tokens: torch.Tensor, noisy: torch.Tensor | None) -> torch.Tensor:
    """What tokens (length,) are put in as, shape (length, hidden); noisy: (1, length) or None.

    The mask of a gated model need not have a row, and has a vector of its own.
    """
    if model.gate is None:
        found: torch.Tensor = model.get_input_embeddings()(tokens)
        return found
    with model.gate.at(tokens[None], noisy) as ids:
        found = model.get_input_embeddings()(ids)[0]
    return found


def _training_attention(there: Subject) -> str:
    """Return what training computes attention with on the device, as transformers names it.

    As `training.setup.attention_implementation` chooses where the recipe leaves it open.
    """
    first: str = there.adapter.implementations[0]
    if there.adapter.measured is not None or "sdpa" not in there.adapter.implementations:
        return first
    if there.runs_on.device == HOST.device:
        return register_tiles()
    return register_flex() if there.runs_on.device.startswith("cuda") and has_flex() else "sdpa"
