"""What is measured on a small instance, question by question.

Every answer is compared with a claim written out here, never with what a class says of itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dllm_convert.behaviour.passes import block_by_block, padded
from dllm_convert.diffusion.attention import StreamMask, document_mask
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.modeling.loading import BROKEN
from dllm_convert.probing.influence import by_layer, whole
from dllm_convert.probing.instance import Instance, attention, text
from dllm_convert.probing.report import Finding

LENGTH, BLOCK = 23, 5
"""Four blocks and a part of one; no divisor in common with a window."""
TOLERANCE = 1e-4
"""Share of the largest logit by which equal passes may differ."""
BOTH, MDLM, BD3LM, KEPT = ("mdlm", "bd3lm"), ("mdlm",), ("bd3lm",), ("keep-base",)
"""What needs an answer: an objective whose attention is opened, or an adapter beside the base."""
ALL = (*BOTH, *KEPT)

Answer = tuple[bool, str, str]


def ask(name: str, targets: Sequence[str], question: Callable[[], Answer]) -> Finding:
    """Put one question; what the class raises is the answer no."""
    try:
        passed, measured, detail = question()
    except BROKEN as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        return Finding(name, False, "fails", f"{type(error).__name__}: {reason}", tuple(targets))
    return Finding(name, passed, measured, "" if passed else detail, tuple(targets))


def _pairs(result: tuple[int, str], of: int = LENGTH * LENGTH) -> Answer:
    wrong, first = result
    return wrong == 0, f"{wrong} of {of} pairs wrong", first


def close(differences: Sequence[torch.Tensor], scale: torch.Tensor, what: str) -> Answer:
    """Answer whether passes that ought to be equal are, to within rounding."""
    worst = max(float(d.abs().max()) if not d.isnan().any() else torch.inf for d in differences)
    limit = TOLERANCE * max(1.0, float(scale.abs().max()))
    return worst <= limit, f"logits differ by {worst:.2g}", f"{what} (at most {limit:.2g})"


def blocks(length: int = LENGTH) -> torch.Tensor:
    """Return who may reach whom in blocks, shape (length, length), bool."""
    position = torch.arange(length)
    return position[:, None] >= position[None, :] // BLOCK * BLOCK


def is_causal(instance: Instance) -> Finding:
    """Ask whether nothing in the base sees what comes after it."""
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def question() -> Answer:
        passed, measured, detail = _pairs(whole(instance.base, LENGTH, ~later, judged=later))
        return passed, measured, f"{detail} in the base: it is no causal decoder"

    return ask("base-causal", ALL, question)


@torch.no_grad()
def same_logits(instance: Instance) -> Finding:
    """Ask whether the diffusion class, left causal, computes what the stock class does."""

    def question() -> Answer:
        tokens = torch.stack([text(LENGTH), text(LENGTH, 1)])
        expected = instance.base(tokens, use_cache=False).logits
        found = instance.opened(causal=True)(tokens, use_cache=False).logits
        return close([found - expected], expected, "the diffusion class computes something else")

    return ask("stock-logits", ALL, question)


@torch.no_grad()
def chosen_logits(model: Any) -> Finding:
    """Ask whether logits at chosen positions are those of the whole text."""

    def question() -> Answer:
        tokens = torch.stack([text(LENGTH), text(LENGTH, 1)])
        every = model(tokens, use_cache=False).logits
        at = torch.tensor([0, 3, LENGTH - 1, LENGTH, 2 * LENGTH - 2])
        found = model(tokens, use_cache=False, logits_at=at).logits
        last = model(tokens, use_cache=False, logits_to_keep=2).logits
        if found.shape != (len(at), every.shape[-1]):
            return False, f"logits of shape {tuple(found.shape)}", f"for {len(at)} positions"
        difference = [found - every.flatten(0, 1)[at], last - every[:, -2:]]
        return close(difference, every, "logits at chosen positions differ")

    return ask("logits-at", BOTH, question)


def gradients(model: Any) -> Finding:
    """Ask whether a backward pass in training mode gives finite gradients."""

    def question() -> Answer:
        tokens = torch.stack([text(LENGTH), text(LENGTH, 1)])
        at = torch.tensor([1, 5, LENGTH + 2])
        model.train()
        try:
            model(tokens, use_cache=False, logits_at=at).logits.logsumexp(-1).mean().backward()
        finally:
            model.eval()
        grads = {name: p.grad for name, p in model.named_parameters()}
        wrong = [n for n, grad in grads.items() if grad is not None and not grad.isfinite().all()]
        if model.get_input_embeddings().weight.grad is None:
            wrong.append("the embedding")
        reached = sum(grad is not None for grad in grads.values())
        model.zero_grad(set_to_none=True)
        detail = f"no finite gradient for {wrong[0]}" if wrong else ""
        return not wrong, f"{reached} of {len(grads)} tensors have gradients", detail

    return ask("gradients", BOTH, question)


@torch.no_grad()
def reload(
    instance: Instance, model: Any, name: str = "reload", targets: Sequence[str] = BOTH
) -> Finding:
    """Ask whether the model is the same when either class loads what was saved."""
    from transformers import AutoModelForCausalLM

    def question() -> Answer:
        tokens = text(LENGTH)[None]
        expected = model(tokens, use_cache=False).logits
        with tempfile.TemporaryDirectory(prefix="dllm-convert-probe-") as folder:
            instance.base.save_pretrained(Path(folder))
            model.config.save_pretrained(Path(folder))
            differences = []
            for cls in (AutoModelForCausalLM, diffusion_class(instance.adapter)):
                loader: Any = cls
                loaded, info = loader.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
                )
                if info["missing_keys"]:
                    missing = ", ".join(sorted(info["missing_keys"])[:2])
                    return False, "does not load", f"{missing} would be random"
                found = loaded.eval()(tokens, use_cache=False).logits
                differences.append(found - expected)
        return close(differences, expected, "saved and loaded again it is another model")

    return ask(name, targets, question)


def end_to_end(
    model: Any,
    allowed: torch.Tensor,
    name: str,
    targets: Sequence[str],
    implementations: Sequence[str],
) -> list[Finding]:
    """Ask who reaches whom from tokens to logits, with every implementation of attention."""
    findings = []
    for implementation in implementations:

        def question(implementation: str = implementation) -> Answer:
            with attention(model, implementation):
                return _pairs(whole(model, LENGTH, allowed))

        findings.append(ask(f"{name}-{implementation}", targets, question))
    return findings


def in_layers(
    model: Any, allowed: torch.Tensor, kinds: Sequence[str]
) -> tuple[tuple[int, ...], Answer]:
    """Ask who reaches whom inside every layer; returns the wrong layers and the answer."""
    found = by_layer(model, LENGTH, allowed)
    wrong = tuple(number for number, (count, _) in found.items() if count)
    measured = f"{len(wrong)} of {len(found)} layers differ"
    if not found:
        return (), (False, measured, "no list of decoder layers was found")
    kind = kinds[min(wrong[0], len(kinds) - 1)] if wrong else ""
    first = f"layer {wrong[0]} ({kind}): {found[wrong[0]][1]}" if wrong else ""
    return wrong, (not wrong, measured, first)


@torch.no_grad()
def padding(model: Any, targets: Sequence[str]) -> Finding:
    """Ask whether padding on either side changes nothing."""

    def question() -> Answer:
        texts = [text(LENGTH, 3), text(LENGTH - 9, 4)]
        filler = torch.stack([text(LENGTH, 5), text(LENGTH, 6)])
        pairs = [pair for left in (True, False) for pair in padded(model, texts, filler, left=left)]
        differences, scale = [found - expected for found, expected in pairs], pairs[-1][1]
        return close(differences, scale, "a padded text is another text")

    return ask(f"padding-{targets[0]}", targets, question)


@torch.no_grad()
def packing(model: Any) -> Finding:
    """Ask whether two texts in one row, kept apart by mask and positions, are two texts."""

    def question() -> Answer:
        first, second = text(LENGTH, 7), text(LENGTH - 6, 8)
        segments = torch.tensor([0] * len(first) + [1] * len(second))[None]
        positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
        row = torch.cat([first, second])[None]
        mask = document_mask(segments)
        packed = model(row, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
        alone = [model(part[None], use_cache=False).logits[0] for part in (first, second)]
        return close([packed - torch.cat(alone)], packed, "packed texts see each other")

    return ask("packing", MDLM, question)


@torch.no_grad()
def streams(model: Any) -> Finding:
    """Ask whether both halves of a training row are what decoding will compute.

    The clean half has to equal the block-causal pass, and every noisy block what the model says of
    it behind clean ones (BD3LM, arXiv 2503.09573).
    """

    def question() -> Answer:
        clean, noisy = text(LENGTH, 9), text(LENGTH, 10)
        position = torch.arange(LENGTH).repeat(2)[None]
        ones = torch.ones(1, LENGTH, dtype=torch.long)
        mask = StreamMask(
            torch.cat([ones, 0 * ones], 1), position // BLOCK, 0 * position, position
        ).dense()
        row = torch.cat([noisy, clean])[None]
        both = model(row, attention_mask=mask, position_ids=position, use_cache=False).logits[0]
        alone = model(clean[None], use_cache=False).logits[0]
        differences = [both[LENGTH:] - alone]
        for start in range(0, LENGTH, BLOCK):
            seen = torch.cat([clean[:start], noisy[start : start + BLOCK]])[None]
            expected = model(seen, use_cache=False).logits[0, start:]
            differences.append(both[start : start + len(expected)] - expected)
        return close(differences, alone, "a training row is not what decoding computes")

    return ask("two-streams", BD3LM, question)


@torch.no_grad()
def cache(model: Any) -> Finding:
    """Ask whether decoding block by block with a KV cache equals the whole pass."""

    def question() -> Answer:
        tokens, noisy = text(LENGTH, 11)[None], text(LENGTH, 12)[None]
        every = model(tokens, use_cache=False).logits
        differences = []
        for step in block_by_block(model, tokens, noisy, BLOCK):
            start = step.first
            span = slice(start, start + BLOCK)
            expected = every[:, span]
            if not step.clean:
                seen = torch.cat([tokens[:, :start], noisy[:, span]], 1)
                expected = model(seen, use_cache=False).logits[:, start:]
            differences.append(step.logits - expected)
        cached = step.cache.get_seq_length()
        if cached != LENGTH:
            return False, f"{cached} tokens cached", f"of {LENGTH}: it has a state"
        return close(differences, every, "block by block is not the whole pass")

    return ask("cache", BD3LM, question)
