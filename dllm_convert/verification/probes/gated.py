"""A gated model: is it its base where nothing is noisy, and does noise stay where it is?

The other probes look at clean text, where a gated model has to be causal. Here a block is noisy.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from dllm_convert.behaviour.influence import Pattern
from dllm_convert.modeling.loading import load_complete
from dllm_convert.modeling.published.gated import ADAPTER_FOLDER, ADAPTER_WEIGHTS
from dllm_convert.verification.probes.influence import observe, probe_length
from dllm_convert.verification.report import Probe, largest, none_wrong, skipped
from dllm_convert.verification.subject import Subject


def check_gated(subject: Subject) -> list[Probe]:
    """Return the probes `gated-base`, `gated-adapter`, `gated-clean` and `gated-attention`."""
    length = probe_length(subject)
    first = (length - 1) // subject.objective.size * subject.objective.size
    return [
        _base(subject, length),
        _adapter(subject, length, first),
        _clean(subject, length, first),
        _attention(subject, length, first),
    ]


def mask_vector(folder: Path) -> torch.Tensor:
    """Return what stands for the mask in a gated checkpoint, shape (hidden,)."""
    with safe_open(folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS, "pt") as file:
        name = next(name for name in file.keys() if name.endswith(".mask_vector"))  # noqa: SIM118
        vector: torch.Tensor = file.get_tensor(name)
    return vector


def noisy_from(tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Return where tokens (rows, length) are noisy that are so from `first` on, bool."""
    return (torch.arange(tokens.shape[1], device=tokens.device) >= first).expand_as(tokens)


def _masked(subject: Subject, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Return tokens (rows, length) with every second one from `first` on masked."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill((place >= first) & (place % 2 == 0), subject.claim.mask_token_id)


@torch.no_grad()
def _base(subject: Subject, length: int) -> Probe:
    """Compare with what everybody else loads from the same folder: the stock class."""
    tokens, adapter = subject.tokens(2, length), subject.adapter
    stock = load_complete(
        getattr(transformers, adapter.stock_class),
        subject.folder,
        dtype=torch.float32,
        attn_implementation=adapter.implementations[0],
    )
    expected = stock(tokens, use_cache=False).logits
    found = subject.model(tokens, use_cache=False).logits
    off = subject.model(
        tokens, noisy=torch.zeros_like(tokens, dtype=torch.bool), use_cache=False
    ).logits
    wrong = int((found != expected).sum())
    return Probe(
        "gated-base",
        torch.equal(found, expected),
        f"{wrong} of {expected.numel()} logits differ, by {largest([found - expected]):.3g}; told "
        f"of no noise by {largest([off - expected]):.3g}",
        "0, to the bit",
    )


@torch.no_grad()
def _adapter(subject: Subject, length: int, first: int) -> Probe:
    tokens = subject.tokens(2, length)
    settings: dict[str, Any] = {"use_cache": False}
    if subject.claim.behind == "mask":
        # Under one mask, what noisy tokens see is no reason to differ.
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        settings["attention_mask"] = mask
    clean = subject.model(tokens, **settings).logits[:, first:]
    found = subject.model(tokens, noisy=noisy_from(tokens, first), **settings).logits[:, first:]
    moved = (found - clean).abs().amax(-1)
    still, required = int((moved == 0).sum()), "0 of them still: the adapter acts"
    if subject.untrained is not False and still == moved.numel():
        return skipped("gated-adapter", required, "the adapter is not trained")
    return Probe(
        "gated-adapter",
        none_wrong(still, moved.numel()),
        f"{still} of {moved.numel()} noisy positions still, the least moves by "
        f"{float(moved.min()):.3g}",
        required,
    )


@torch.no_grad()
def _clean(subject: Subject, length: int, first: int) -> Probe:
    """Change all that is noisy, tokens and adapter: to the bit, clean positions stay."""
    tokens = subject.tokens(1, length)
    other = torch.cat([tokens[:, :first], subject.other_tokens(tokens[:, first:])], 1)
    text = torch.cat([_masked(subject, tokens, first), other])
    noisy = noisy_from(text, first)
    rows = subject.model(text, noisy=noisy, use_cache=False).logits[:, :first]
    alone = subject.model(tokens[:, :first].expand(2, -1), use_cache=False).logits
    wrong = int((rows[0] != rows[1]).any(-1).sum())
    apart = largest([rows - alone])
    return Probe(
        "gated-clean",
        wrong == 0 and apart <= subject.adapter.tolerance,
        f"{wrong} of {first} clean positions see noise; without it they differ by {apart:.3g}",
        f"0, and at most {subject.adapter.tolerance:g}",
    )


def claimed(length: int, first: int, *, causal: bool = False) -> torch.Tensor:
    """Return which token may reach which position where all from `first` on are one noisy block.

    With `causal` its tokens reach only those that stand after them.

    Written out here a second time on purpose: verification must not trust the model's own mask.
    """
    place = torch.arange(length)
    noisy = place >= first
    before = place[:, None] >= place[None]
    if causal:
        return before
    return before & ~noisy[None] | (noisy[:, None] & noisy[None])


def _attention(subject: Subject, length: int, first: int) -> Probe:
    columns = list(range(length)) if length <= 48 else sorted({0, first - 1, first, length - 1})
    causal = subject.claim.draft == "causal"
    allowed = claimed(length, first, causal=causal)[:, columns]
    noisy = noisy_from(subject.tokens(1, length), first)
    model = partial(subject.model, noisy=noisy)

    def text(draw: int) -> torch.Tensor:
        return subject.tokens(1, length, draw=draw)[0]

    pattern: Pattern = observe(subject, model, text, columns, allowed)
    judged = torch.ones_like(allowed)
    if subject.claim.behind == "cache":
        # What a window of the base hides stays hidden: nobody sees ahead, and all see themselves.
        judged = ~allowed | (torch.arange(length)[:, None] == torch.tensor(columns)[None])
    wrong = int((pattern.wrong & judged).sum())
    return Probe(
        "gated-attention",
        none_wrong(wrong, int(judged.sum())),
        f"{wrong} of {int(judged.sum())} pairs wrong with the last block noisy",
        f"0 pairs: closed up to {pattern.limit:.2g}, open above",
        pattern.first_wrong(judged),
    )
