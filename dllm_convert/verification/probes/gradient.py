"""Attention by gradient: which tokens does the output at a position depend on, exactly?

A pair that attention closes has a weight of exactly zero in the softmax, so the derivative through
it is exactly zero: nothing here needs a tolerance. Perturbation (`influence.py`) needs one, but
sees what a derivative cannot, such as a hard switch. Each covers for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dllm_convert.behaviour.influence import DRAWS, Pattern
from dllm_convert.verification.instruments.attention import IMPLEMENTATIONS, running
from dllm_convert.verification.instruments.layers import (
    AttentionCall,
    attention_modules,
    record_calls,
)
from dllm_convert.verification.probes.influence import (
    first_wrong,
    layer_kinds,
    pattern_probe,
    probe_columns,
    probe_length,
    probe_lengths,
)
from dllm_convert.verification.report import Probe, none_wrong
from dllm_convert.verification.subject import SEED, Subject

TOKENS_AT_ONCE = 192
"""A backward keeps every activation: few rows at a time."""
BY_LAYER = tuple(name for name in IMPLEMENTATIONS if name != "flex")
"""Torch has no backward of flex attention on a CPU."""


def check_gradient(subject: Subject) -> list[Probe]:
    """Return the probes `gradient` and `gradient-layers`."""
    return [end_to_end(subject, "gradient"), _by_layer(subject)]


def end_to_end(subject: Subject, name: str) -> Probe:
    """Differentiate the whole model, with the attention that it has."""
    patterns: dict[int, Pattern] = {}
    for length in probe_lengths(subject):
        rows = probe_columns(length, subject.claim.block_size)
        if patterns:
            rows = sorted({0, length - 1, *(r for r in rows if r + 1 == subject.claim.block_size)})
        patterns[length] = _observe(subject, rows, length)
    return pattern_probe(name, patterns)


def _observe(subject: Subject, rows: list[int], length: int) -> Pattern:
    allowed = subject.allowed(length)[rows]
    moved = torch.zeros(allowed.shape)
    for draw in range(DRAWS):
        tokens = subject.tokens(1, length, draw=draw)[0]
        embedded = subject.model.get_input_embeddings()(tokens).detach()
        moved = torch.maximum(moved, measure_gradient(subject.model, embedded, rows))
        if not (allowed & (moved == 0)).any():
            break
    return Pattern(moved, allowed, 0.0, list(range(length)), rows)


def measure_gradient(model: Any, embedded: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Differentiate the logits at each position by the embedding of each token.

    Args:
        model: A diffusion model, or one with more inputs bound.
        embedded: Embeddings of a text, shape (length, hidden).
        positions: Where logits are read.

    Returns:
        Norm of the gradient of a random sum of logits, shape (positions, length), on the CPU.
    """
    length = len(embedded)

    def logits(hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        flat = torch.arange(len(at), device=at.device) * length + at
        found: torch.Tensor = model(inputs_embeds=hidden, logits_at=flat, use_cache=False).logits
        return found

    return _norms(logits, embedded, positions)


def _norms(
    outputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    positions: list[int],
) -> torch.Tensor:
    """Return gradient norms, shape (positions, length).

    Args:
        outputs: From inputs (rows, length, hidden) and one position per row to outputs (rows, n).
        hidden: Inputs of one text, shape (length, hidden).
        positions: Where outputs are read.
    """
    per_chunk = max(1, TOKENS_AT_ONCE // len(hidden))
    norms: list[torch.Tensor] = []
    for first in range(0, len(positions), per_chunk):
        at = torch.tensor(positions[first : first + per_chunk], device=hidden.device)
        inputs = hidden.expand(len(at), -1, -1).clone().requires_grad_()
        found = outputs(inputs, at)
        generator = torch.Generator().manual_seed(SEED)
        direction = torch.randn(found.shape[-1], generator=generator).to(found)
        (gradient,) = torch.autograd.grad((found * direction).sum(), inputs)
        norms.append(gradient.float().norm(dim=-1).cpu())
    return torch.cat(norms)


def _by_layer(subject: Subject) -> Probe:
    """Differentiate every attention module alone: an open layer before it hides nothing."""
    length = probe_length(subject)
    rows = probe_columns(length, subject.claim.block_size)
    layers = range(int(subject.config["num_hidden_layers"]))
    allowed = [subject.allowed_in(layer, length)[rows] for layer in layers]
    wrong, count, first = 0, 0, ""
    names = [name for name in BY_LAYER if name in subject.adapter.implementations]
    for name in names:
        with running(subject, name) as model:
            for layer, moved in enumerate(_layer_norms(subject, model, rows, allowed)):
                pattern = Pattern(moved, allowed[layer], 0.0, list(range(length)), rows)
                count += 1
                if pattern.wrong.any():
                    wrong += 1
                    first = first or f"{name}, layer {layer}: {first_wrong(pattern)}"
    return Probe(
        "gradient-layers",
        none_wrong(wrong, count),
        f"{wrong} of {count} layers differ, {' and '.join(names)}",
        f"0 of {layer_kinds(subject)} in each",
        first,
    )


def _layer_norms(
    subject: Subject, model: Any, rows: list[int], allowed: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the gradient norms of each layer's attention, each (rows, length)."""
    modules = attention_modules(model, int(subject.config["num_hidden_layers"]))
    length = allowed[0].shape[1]
    total: list[torch.Tensor] = []
    for draw in range(DRAWS):
        calls = record_calls(model, modules, input_ids=subject.tokens(1, length, draw=draw))
        found = [_attention_norms(call, rows) for call in calls]
        total = [torch.maximum(a, b) for a, b in zip(total, found, strict=True)] if total else found
        # Over texts: a softmax may round one allowed weight to zero.
        if all(bool((norms > 0)[a].all()) for norms, a in zip(total, allowed, strict=True)):
            break
    return total


def _attention_norms(call: AttentionCall, rows: list[int]) -> torch.Tensor:
    def outputs(inputs: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return call.run(inputs)[torch.arange(len(at), device=at.device), at]

    return _norms(outputs, call.hidden[0], rows)
