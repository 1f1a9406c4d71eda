"""Invariance: padding, neighbours in the batch and the KV cache change nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dllm_convert.behaviour.influence import STILL
from dllm_convert.behaviour.passes import block_by_block, padded
from dllm_convert.modeling.published.rope import final_lengths
from dllm_convert.verification.instruments.attention import IMPLEMENTATIONS, missing, running
from dllm_convert.verification.instruments.layers import attention_modules, record_calls
from dllm_convert.verification.probes.gated import noisy_from
from dllm_convert.verification.probes.influence import probe_length
from dllm_convert.verification.report import Probe, at_most, largest, skipped
from dllm_convert.verification.subject import Subject

Judge = Callable[[Subject, str, Callable[[], float], float | None], Probe]
"""Says whether a difference is rounding; the arguments are those of `invariant`."""


def invariant(
    subject: Subject, name: str, measure: Callable[[], float], first: float | None = None
) -> Probe:
    """Judge a difference that should be zero but for rounding.

    Some models hold activations in the tens of thousands, where float32 rounding alone exceeds any
    useful tolerance. So a difference that is too large is measured again in float64: rounding
    vanishes there, a fault does not.

    Args:
        subject: The checkpoint.
        name: Name of the probe.
        measure: Measures again, in the model's present precision.
        first: The difference in float32, if it is measured already.
    """
    first = measure() if first is None else first
    difference, detail = first, ""
    if not first <= subject.adapter.tolerance:
        with subject.float64():
            difference = measure()
        detail = f"in float64; rounding included, float32 gives {first:.3g}"
    return at_most(
        name,
        "logits differ by",
        difference,
        subject.adapter.tolerance,
        detail=detail,
    )


@torch.no_grad()
def check_padding(subject: Subject, judge: Judge = invariant) -> list[Probe]:
    """Return the probes `padding-left` and `padding-right`: a mixed batch against one by one."""
    longest = min(probe_length(subject), 48)
    lengths = sorted({longest, max(longest // 2, 1)})
    texts = [subject.tokens(1, length, draw=length) for length in lengths]
    probes = []
    for side in ("left", "right"):
        measure = partial(_padded, subject, side, texts)
        probes.append(judge(subject, f"padding-{side}", measure, None))
    return probes


@torch.no_grad()
def check_batch(subject: Subject) -> list[Probe]:
    """Return the probes `batch` and `implementations`."""
    neighbours = invariant(subject, "batch", partial(with_neighbours, subject))
    if subject.claim.behind == "cache":
        # Layers need not be attention, and are whatever the stock class makes of them.
        return [neighbours]
    return [neighbours, _across_implementations(subject)]


def with_neighbours(subject: Subject) -> float:
    """Return the largest difference that neighbours in the batch, or their order, make."""
    texts = subject.tokens(3, min(probe_length(subject), 48))
    together = subject.model(texts, use_cache=False).logits
    turned = subject.model(texts.flip(0), use_cache=False).logits.flip(0)
    alone = [subject.model(text[None], use_cache=False).logits[0] for text in texts]
    return largest([together - turned, *(a - b for a, b in zip(together, alone, strict=True))])


def _across_implementations(subject: Subject) -> Probe:
    """Give every attention module the same input in each implementation, left padding included.

    Layer by layer, because deep models magnify the rounding of the first layers beyond any useful
    tolerance, and eager attention rounds to float32 even in float64.
    """
    length = min(probe_length(subject), 48)
    texts, mask = subject.tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 2] = 0
    count = int(subject.config["num_hidden_layers"])
    known: list[tuple[torch.Tensor, torch.Tensor]] = []
    worst: dict[str, tuple[float, int]] = {}
    for name in IMPLEMENTATIONS:
        if missing(subject, name):
            continue
        with running(subject, name) as model:
            modules = attention_modules(model, count)
            calls = record_calls(model, modules, input_ids=texts, attention_mask=mask)
            if not known:
                known = [(call.hidden, call.run(call.hidden)[mask.bool()]) for call in calls]
                continue
            apart = [
                largest([call.run(hidden)[mask.bool()] - output]) / float(output.abs().max())
                for call, (hidden, output) in zip(calls, known, strict=True)
            ]
        worst[name] = max((value, layer) for layer, value in enumerate(apart))
    required = f"at most {STILL:g} of the largest output, in each of {count} layers"
    if not worst:
        return skipped("implementations", required, "one implementation runs here: none to compare")
    return Probe(
        "implementations",
        all(value <= STILL for value, _ in worst.values()),
        ", ".join(f"{name} differs from sdpa by {v:.2g}" for name, (v, _) in worst.items()),
        required,
        ", ".join(
            f"{name} most in layer {layer}"
            for name, (value, layer) in worst.items()
            if not value <= STILL
        ),
    )


def _padded(subject: Subject, side: str, texts: list[torch.Tensor]) -> float:
    """Return the largest difference that padding on one side makes to the logits of any text."""
    filler = subject.tokens(len(texts), max(text.shape[1] for text in texts), draw=1)
    pairs = padded(subject.model, [text[0] for text in texts], filler, left=side == "left")
    return largest([found - expected for found, expected in pairs])


@torch.no_grad()
def check_cache(subject: Subject, judge: Judge = invariant) -> list[Probe]:
    """Return the probes `cache` and `cache-clean`: block by block against all at once."""
    size = subject.claim.block_size
    if size is None:
        reason = "mdlm decodes without a cache"
        return [skipped(name, "no difference", reason) for name in ("cache", "cache-clean")]
    tokens = subject.tokens(1, probe_length(subject))
    # As a decoding of this length: some rotary frequencies depend on it.
    length = torch.tensor([tokens.shape[1]], device=tokens.device)
    with final_lengths(subject.model, lambda: length):
        return _check_cache(subject, tokens, size, judge)


def _check_cache(subject: Subject, tokens: torch.Tensor, size: int, judge: Judge) -> list[Probe]:
    difference, dirt = _decode_with_cache(subject, tokens, size)

    def measure() -> float:
        return _decode_with_cache(subject, tokens, size)[0]

    clean = Probe("cache-clean", dirt == 0, f"{dirt} states changed by denoising", "0")
    if tokens.shape[1] <= size:
        clean = skipped("cache-clean", "0", f"a context of {subject.context} tokens is one block")
    return [judge(subject, "cache", measure, difference), clean]


def _decode_with_cache(subject: Subject, tokens: torch.Tensor, size: int) -> tuple[float, int]:
    """Walk over the blocks as decoding does: denoise against a frozen cache, then extend it.

    Returns:
        Largest difference from the logits of the whole text at once, and how many of the cache's
        tensors the denoising forwards changed.
    """
    whole = subject.model(tokens, use_cache=False).logits
    # Of every block the first token and every second after it.
    masked = torch.arange(tokens.shape[1], device=tokens.device) % size % 2 == 0
    noisy = tokens.masked_fill(masked, subject.claim.mask_token_id)
    differences: list[torch.Tensor] = []
    before: list[torch.Tensor] = []
    dirt = 0
    for step in block_by_block(subject.model, tokens, noisy, size):
        states = _states(step.cache)
        if step.clean:
            end = step.first + step.logits.shape[1]
            differences.append(step.logits - whole[:, step.first : end])
            before = [state.clone() for state in states]
            continue
        pairs = zip(before, states, strict=False)
        dirt += sum(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
        dirt += abs(len(states) - len(before))
        denoised = step
    # The last block once more, noisy, behind the clean ones: what denoising must have seen.
    first = denoised.first
    text = torch.cat([tokens[:, :first], noisy[:, first:]], dim=1)
    told = {"noisy": noisy_from(text, first)} if subject.claim.is_gated else {}
    seen = subject.model(text, use_cache=False, **told).logits[:, first:]
    differences.append(denoised.logits - seen)
    return largest(differences), dirt


def _states(cache: Any) -> list[torch.Tensor]:
    """Return keys and values of the filled layers, each (batch, heads, cached, head_dim)."""
    filled = [layer for layer in cache.layers if layer.get_seq_length()]
    return [state for layer in filled for state in (layer.keys, layer.values)]
