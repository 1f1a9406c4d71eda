"""Likelihood: is the number that a run reports computed as it should be?

What measurements rest on: block diffusion with blocks of one token is the autoregressive model, and
predictions are read at the position that the checkpoint says.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.modeling.published.choosing import forbid
from dllm_convert.verification.probes.outcome import NORMAL_95
from dllm_convert.verification.report import Probe, skipped
from dllm_convert.verification.subject import SEED, Subject
from dllm_convert.weights.tokenizer import SAMPLES

AR_TOLERANCE = 1e-5
"""Nats per token: float32 resolves about 1e-6 of a mean of some nats."""
SHIFT_SPREADS = 3.0
"""Standard errors by which the other alignment has to be better before this one is called wrong."""
LENGTH = 48


def check_likelihood(subject: Subject) -> list[Probe]:
    """Return the probes `block-one` and `token-shift`."""
    return [_block_one(subject), _token_shift(subject)]


def _block_one(subject: Subject) -> Probe:
    """Compare BD3LM with blocks of one token and token shift with the autoregressive likelihood.

    They are one number (BD3LM, arXiv 2503.09573, section 3), for any weights; on the untrained
    conversion it is the base's.
    """
    required = f"at most {AR_TOLERANCE:g} nats per token"
    blocks = subject.claim.is_gated or "bd3lm" in subject.adapter.targets
    if subject.adapter.attention != "causal" or not blocks:
        return skipped("block-one", required, "the base is not autoregressive")
    batch = _texts(subject)
    first = _apart(subject, batch)
    apart, note = first, ""
    if not apart[0] <= AR_TOLERANCE:
        with subject.float64():
            apart = _apart(subject, batch)
        note = f"in float64; rounding included, float32 gives {first[0]:.3g}; "
    whose = "the base's" if subject.untrained else "this model's"
    return Probe(
        "block-one",
        apart[0] <= AR_TOLERANCE,
        f"differs by {apart[0]:.2g} nats per token",
        required,
        f"{note}{whose} AR NLL is {apart[1]:.4g} on {int(batch.scorable.sum())} tokens",
    )


def _texts(subject: Subject) -> TextBatch:
    """Return random text in two rows, the second of two documents."""
    width = min(LENGTH, subject.context)
    cut = width // 3
    places = torch.arange(width)
    second = torch.cat([places[:cut], places[: width - cut]])
    return TextBatch(
        subject.tokens(2, width),
        torch.stack([torch.zeros_like(places), (places >= cut).long()]),
        torch.stack([places, second]),
    )


@torch.no_grad()
def _apart(subject: Subject, batch: TextBatch) -> tuple[float, float]:
    """Return by how many nats per token the two differ, and the autoregressive one."""
    claim = subject.claim
    mask = claim.mask_token_id
    objective = Objective(
        "bd3lm", mask, token_shift=True, block_size=1, acts_on=claim.acts_on, behind=claim.behind
    )
    blocks = nelbo(subject.model, [batch], objective, seed=SEED).nats_per_token
    total, count = 0.0, 0
    for row, segments in zip(batch.tokens, batch.segments, strict=True):
        for segment in segments.unique():
            text = row[segments == segment]
            seen = None
            if claim.behind == "mask":
                seen = torch.ones(len(text), len(text)).tril().bool()[None, None]
            logits = subject.model(text[None], attention_mask=seen, use_cache=False).logits[0]
            logits = logits.double()
            forbid(logits, mask)
            found = logits[:-1].log_softmax(-1).gather(-1, text[1:, None])
            total, count = total - float(found.sum()), count + len(text) - 1
    return abs(blocks - total / count), total / count


@torch.no_grad()
def _token_shift(subject: Subject) -> Probe:
    """Read predictions at the other position: is the text likelier there?

    An untrained conversion can be read either way, so only a training decides.
    """
    required = f"no better than claimed by {SHIFT_SPREADS:g} standard errors"
    planned = (subject.manifest.get("recipe") or {}).get("token_shift")
    claimed = subject.claim.token_shift
    if planned in ("keep", "drop"):
        # Encoders never predicted the next token: they have no shift to keep.
        expected = planned == "keep" and subject.adapter.attention == "causal"
        return Probe(
            "token-shift",
            expected == claimed,
            f"token_shift is {claimed}",
            f"{expected}, as the recipe in the manifest says",
        )
    if subject.untrained is not False:
        known = "not known to be trained" if subject.untrained is None else "not trained"
        return skipped("token-shift", required, f"the weights are {known}")
    measure = partial(nelbo, subject.model, [_prose(subject)], seed=SEED)
    ours = subject.objective
    here = measure(ours)
    there = measure(replace(ours, token_shift=not claimed))
    spread = math.hypot(here.stderr, there.stderr)
    better = here.nats_per_token - there.nats_per_token
    return Probe(
        "token-shift",
        better <= SHIFT_SPREADS * spread,
        f"token_shift {claimed} {here.nats_per_token:.4g} nats per token, "
        f"{not claimed} {there.nats_per_token:.4g} ± {NORMAL_95 * spread:.2g}",
        required,
    )


def _prose(subject: Subject) -> TextBatch:
    """Return text that people wrote, in rows of one document each."""
    import pydoc_data.topics as reference

    text = " ".join([*SAMPLES, *sorted(reference.topics.values(), key=len)[-2:]])
    width = min(LENGTH, subject.context)
    ids = subject.tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    rows = max(1, min(8, len(ids) // width))
    tokens = torch.tensor(ids[: rows * width]).view(rows, -1)
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    return TextBatch(tokens, torch.zeros_like(tokens), places)
