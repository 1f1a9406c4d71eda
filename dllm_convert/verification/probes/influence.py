"""Attention: change one token, see which positions move, and compare with the claim."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from dllm_convert.behaviour.influence import Pattern, patterns
from dllm_convert.planning.attention import layer_types
from dllm_convert.verification.instruments.attention import IMPLEMENTATIONS, missing, running
from dllm_convert.verification.report import Probe, none_wrong, skipped
from dllm_convert.verification.subject import Subject

ALL_COLUMNS_UP_TO = 40
FEW_COLUMNS_ABOVE = 200


def check_influence(subject: Subject) -> list[Probe]:
    """Return the probes `attention-sdpa`, `attention-eager`, `-flex` and `attention-layers`."""
    probes = []
    for name in IMPLEMENTATIONS:
        reason = missing(subject, name)
        if reason:
            probes.append(skipped(f"attention-{name}", "0 pairs wrong", reason))
            continue
        with running(subject, name) as model:
            probes.append(pattern_probe(f"attention-{name}", end_to_end(subject, model)))
            if name == "eager":
                probes.append(_by_layer(subject, model, probe_length(subject)))
    return probes


def probe_length(subject: Subject) -> int:
    """Return a length that crosses blocks and ends inside one, if the context allows."""
    size = subject.claim.block_size
    if size is None:
        # Past the reach of a local layer, so that its window shows.
        return min(max(24, (subject.reach or 0) + 8), subject.context)
    whole = 2 * size if size <= FEW_COLUMNS_ABOVE // 2 else size
    length = max(whole + max(size // 2, 1), 8)
    return min(length + (length % size == 0 and size > 1), subject.context)


def probe_lengths(subject: Subject) -> tuple[int, ...]:
    """Return lengths that do not divide into blocks.

    The first is `probe_length`; the others end inside the first block and right after it.
    """
    longest = probe_length(subject)
    size = subject.claim.block_size or longest
    shorter = {size // 2 + 1, size + 1}
    return longest, *sorted(n for n in shorter if 1 < n < longest and n % size)


def probe_columns(length: int, block_size: int | None) -> list[int]:
    """Return which tokens to change: all in a short text, else those around block boundaries."""
    if length <= ALL_COLUMNS_UP_TO:
        return list(range(length))
    size = block_size or length
    edges = {size - 1, size, 2 * size - 1, 2 * size, length - 1}
    if length <= FEW_COLUMNS_ABOVE:
        # Spread over the text by the golden ratio, so that no period is missed.
        edges |= {0} | {int(length * (0.618 * k % 1)) for k in range(1, 4)}
    return sorted(column for column in edges if column < length)


def observe(
    subject: Subject,
    model: Any,
    text: Callable[[int], torch.Tensor],
    columns: list[int],
    allowed: torch.Tensor,
) -> Pattern:
    """Measure influence over as many texts as it takes for every allowed one to show.

    Args:
        subject: The checkpoint.
        model: As for `measure_influence`.
        text: Returns a text, shape (length,), for the number of the draw.
        columns: Tokens to change.
        allowed: The claim, shape (length, columns).
    """
    for pattern in patterns(model, text, subject.other_tokens, columns, allowed):
        if not pattern.hidden.any():
            break
    return pattern


def first_wrong(pattern: Pattern) -> str:
    """Describe the first difference from the claim, empty if there is none."""
    first = pattern.first_wrong()
    if not first:
        return ""
    return f"{first}, and should{'' if 'does not see' in first else ' not'}"


def end_to_end(subject: Subject, model: Any) -> dict[int, Pattern]:
    """Return who moves whom, by length of the text."""
    size = subject.claim.block_size
    found: dict[int, Pattern] = {}
    for length in probe_lengths(subject):
        columns = probe_columns(length, size)
        if found:
            columns = sorted({0, length - 1, *(c for c in columns if c + 1 in (size, length - 1))})
        text = partial(_text, subject, length)
        allowed = subject.allowed(length)[:, columns]
        found[length] = observe(subject, model, text, columns, allowed)
    return found


def _text(subject: Subject, length: int, draw: int) -> torch.Tensor:
    return subject.tokens(1, length, draw=draw)[0]


def pattern_probe(name: str, by_length: Mapping[int, Pattern]) -> Probe:
    """Judge patterns measured at several lengths."""
    found = list(by_length.values())
    wrong = sum(int(pattern.wrong.sum()) for pattern in found)
    pairs = sum(pattern.allowed.numel() for pattern in found)
    closed = max((p.worst_forbidden for p in found if not p.allowed.all()), default=math.inf)
    opened = min(pattern.weakest_allowed for pattern in found)
    limit = max(pattern.limit for pattern in found)
    lengths = ", ".join(str(length) for length in sorted(by_length))
    firsts = (f"{first_wrong(p)} ({n} tokens)" for n, p in by_length.items() if p.wrong.any())
    return Probe(
        name,
        none_wrong(wrong, pairs),
        f"{wrong} of {pairs} pairs wrong at {lengths} tokens: closed {_least(closed)}, "
        f"open {_least(opened)}",
        f"0 pairs: closed up to {limit:.2g}, open above",
        next(firsts, ""),
    )


def _least(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "none"


@torch.no_grad()
def _by_layer(subject: Subject, model: Any, length: int) -> Probe:
    """Look at every layer's weights: one closed layer hides behind an open one end to end."""
    tokens = subject.tokens(2, length)
    layers = model(tokens, use_cache=False, output_attentions=True).attentions or ()
    wrong = 0
    first = ""
    for number, weights in enumerate(layers):
        # Over texts and heads: a softmax may round one allowed weight to zero.
        allowed = subject.allowed_in(number, length)
        pattern = Pattern(weights.float().amax(dim=(0, 1)), allowed, 0.0, list(range(length)))
        if pattern.wrong.any():
            wrong += 1
            first = first or f"layer {number}: {first_wrong(pattern)}"
    count = int(subject.config["num_hidden_layers"])
    return Probe(
        "attention-layers",
        none_wrong(wrong, len(layers)) and len(layers) == count,
        f"{wrong} of {len(layers)} layers differ",
        f"0 of {layer_kinds(subject)}",
        first,
    )


def layer_kinds(subject: Subject) -> str:
    """Return how many layers of which kind the config declares, such as `30 full_attention`."""
    kinds = Counter(layer_types(subject.config, subject.adapter))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
