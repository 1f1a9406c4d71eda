"""Outcome: decoding leaves no mask behind, and training lowered the bound on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dllm_convert.verify.report import Probe, first_items, skipped
from dllm_convert.verify.subject import Subject

STEPS = 2
"""Denoising steps per block: enough to commit in turns, few enough to be quick."""


def check_generate(subject: Subject) -> list[Probe]:
    """Return the probe `generate`: a left-padded batch of two prompts that end inside a block."""
    size = subject.claim.block_size or 8
    # From inside one block, over its end, to inside the next.
    new = min(size, 48)
    width = min(size + max(size // 4, 2), 96, subject.context - new)
    if width < 2:
        reason = f"a context of {subject.context} tokens has no room for a prompt and a block"
        return [skipped("generate", "0 masked", reason)]
    prompts = subject.tokens(2, width)
    mask = torch.ones_like(prompts)
    mask[1, : width // 2] = 0
    output = subject.model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=new,
        max_denoising_steps=STEPS,
        confidence_threshold=None,
        temperature=0.0,
    )
    wrong: list[str] = []
    if tuple(output.shape) != (2, width + new):
        wrong.append(f"the output has shape {tuple(output.shape)}")
    if not torch.equal(output[:, :width], prompts):
        wrong.append("the prompt came back changed")
    left = int((output[:, width:] == subject.claim.mask_token_id).sum())
    if left:
        wrong.append(f"{left} positions are still masked")
    return [
        Probe(
            "generate",
            not wrong,
            f"{output.shape[1] - width} new tokens, {left} masked",
            f"{new}, 0, prompt unchanged",
            first_items(wrong),
        )
    ]


def _nats(quality: Mapping[str, Any], name: str) -> float | None:
    value = quality.get(name)
    return float(value["nats_per_token"]) if isinstance(value, Mapping) else None


def check_quality(subject: Subject) -> list[Probe]:
    """Return the probe `quality`: held-out NELBO after training below that before."""
    required = "below that before training"
    if subject.untrained:
        return [skipped("quality", required, "the weights were not trained")]
    before, after = (_nats(subject.quality, f"nelbo_{when}") for when in ("before", "after"))
    if before is None or after is None:
        return [skipped("quality", required, "no held-out measurement is recorded")]
    base = _nats(subject.quality, "ar_nll")
    note = "" if base is None else f"the base's own NLL on the same tokens is {base:.4g}"
    return [
        Probe(
            "quality",
            after < before,
            f"held-out NELBO {after:.4g} nats per token",
            f"below {before:.4g}, before training",
            note,
        )
    ]
