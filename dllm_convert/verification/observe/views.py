"""Measure what the pictures of a run and of a verification show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_convert.common.memory import free_memory
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.modeling import loading
from dllm_convert.verification.memory import group_refusal
from dllm_convert.verification.observe.curves import measure_decoding, measure_rates
from dllm_convert.verification.observe.heatmaps import map_of
from dllm_convert.verification.observe.observations import Influence, Observations, RatePoint
from dllm_convert.verification.opening import VerificationRequest, opened
from dllm_convert.verification.subject import Subject


def _shown_block(subject: Subject) -> int | None:
    """Tokens that see each other on the text that is shown, which is clean: a base is causal."""
    return 1 if subject.claim.is_gated else subject.claim.block_size


def observe_run(
    weights: Path,
    base: Path,
    *,
    untrained: Path | None,
    held_out: Sequence[TextBatch],
    load: Callable[[Path], Any],
    load_base: Callable[[Path], Any],
    seed: int,
) -> Observations:
    """Measure influence, and with held-out text the curves, on what a run has made.

    Three models are loaded, each when the one before it is freed: a device need not hold two.

    Args:
        weights: The converted checkpoint as it will be published.
        base: Folder of the base's safetensors weights.
        untrained: The conversion before training, None if it was not trained.
        held_out: Text that was not trained on; empty for none.
        load: Loads a converted checkpoint onto the device it is measured on.
        load_base: Loads the base there, in the same type.
        seed: Seed of the noise.
    """
    before: tuple[RatePoint, ...] = ()
    if untrained is not None:
        model = load(untrained)
        batches = [batch.to(model.device) for batch in held_out]
        objective = Objective.from_config(model.config)
        before = measure_rates(model, batches, objective, seed=seed)
        del model, batches
        free_memory()
    with opened(weights, VerificationRequest(base)) as subject:
        shown = map_of(subject, load_base(base))
        free_memory()
        model = load(weights)
        influence = Influence(map_of(subject, model), shown, _shown_block(subject))
        batches = [batch.to(model.device) for batch in held_out]
        if not batches:
            return Observations(influence)
        after = measure_rates(model, batches, Objective.from_config(model.config), seed=seed)
        decoding = measure_decoding(model, batches, context=subject.context)
        return Observations(influence, before, after, decoding)


def observe_checkpoint(
    folder: Path, asked: VerificationRequest, verification: Mapping[str, Any]
) -> Observations:
    """Measure who sees whom in a checkpoint; the curves are those its manifest holds.

    Without a base at hand its map is the manifest's, if that is of the same text. A checkpoint
    whose attention could not be verified is not measured, for whatever reason that was.

    Args:
        folder: The checkpoint.
        asked: What the verification was asked for, the base's folder among it.
        verification: Its verification.
    """
    with opened(folder, asked) as subject:
        known = Observations.from_measurements(subject.manifest.get("measurements") or {})
        if not any(map(_measured_attention, verification["probes"])):
            return replace(known, influence=None)
        base = None
        if asked.against is not None and _fits_beside(subject, verification):
            base = map_of(subject, loading.load_base(asked.against, subject.adapter))
        found = Influence(map_of(subject, subject.model), base, _shown_block(subject))
    if found.base is None and known.influence is not None and _alike(found, known.influence):
        found = replace(found, base=known.influence.base)
    return replace(known, influence=found)


def _fits_beside(subject: Subject, verification: Mapping[str, Any]) -> bool:
    """Whether a base can be loaded: nothing was found wrong with it, and there is memory."""
    wrong = any(
        str(probe["name"]).startswith("base-") and probe["passed"] is False
        for probe in verification["probes"]
    )
    return not wrong and group_refusal(subject, "base") is None


def _measured_attention(probe: Mapping[str, Any]) -> bool:
    return (
        str(probe["name"]).startswith("attention-")
        and probe["passed"] is not None
        and probe["measured"] != "could not be measured"
    )


def _alike(one: Influence, other: Influence) -> bool:
    """Whether two maps are of texts of the same length, changed at the same tokens."""
    return all(
        getattr(one.converted, name) == getattr(other.converted, name)
        for name in ("length", "stride")
    )
