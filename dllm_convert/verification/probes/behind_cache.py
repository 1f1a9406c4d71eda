"""A gated model whose noisy tokens stand behind a copy of the base's cache: is that the whole text?

No attention of such a model is opened, so that there is no mask to look at: what has to be looked
at is the cache. What is expected is computed from the whole text in one forward, without any.
"""

from __future__ import annotations

from functools import partial

import torch

from dllm_convert.diffusion.cached import CleanReader, cached_nats, predict_behind_cache
from dllm_convert.diffusion.corruption import Corruption, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import measured_process
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.diffusion.streams import corrupted
from dllm_convert.verification.probes.gated import noisy_from
from dllm_convert.verification.probes.influence import probe_length
from dllm_convert.verification.probes.invariance import invariant
from dllm_convert.verification.probes.training_forward import packed_row
from dllm_convert.verification.report import Probe, largest, skipped
from dllm_convert.verification.subject import SEED, Subject


def check_behind_cache(subject: Subject) -> list[Probe]:
    """Return the probes `behind-cache`, `behind-copy` and `behind-training`."""
    difference, dirt = _block_by_block(subject)
    probes = [
        invariant(subject, "behind-cache", lambda: _block_by_block(subject)[0], difference),
        Probe("behind-copy", dirt == 0, f"{dirt} states changed by noisy rows", "0"),
    ]
    batch = packed_row(subject, subject.objective)
    if batch is None:
        reason = f"a context of {subject.context} tokens has no room for two documents"
        return [*probes, skipped("behind-training", "no difference", reason)]
    key = NoiseKey(SEED, 0, 0, 1, "verify")
    (noise,) = corrupt(batch, subject.objective, measured_process(subject.objective), key)
    return [*probes, invariant(subject, "behind-training", partial(_apart, subject, batch, noise))]


@torch.no_grad()
def _block_by_block(subject: Subject) -> tuple[float, int]:
    """Walk over the blocks of a text as decoding does, noisy rows behind every one of them.

    Returns:
        The largest difference of a logit from what the whole text gives, and how many tensors of
        the base's cache noisy rows change.
    """
    size, model = subject.objective.size, subject.model
    tokens = subject.tokens(1, probe_length(subject))
    length = tokens.shape[1]
    whole = model(tokens, use_cache=False).logits[0]
    reader, differences, dirt = CleanReader(model, tokens), [], 0
    for first in range(0, length, size):
        span = slice(first, min(first + size, length))
        place = torch.arange(span.stop - first, device=tokens.device)
        noisy = tokens[:, span].masked_fill(place % 2 == 0, subject.claim.mask_token_id)
        # Two rows behind one boundary, the second as clean as the adapter leaves it.
        rows = torch.cat([noisy, tokens[:, span]])
        before = [state.clone() for state in reader.states] if first else []
        beside = reader.behind(torch.zeros(2, dtype=torch.long, device=tokens.device))
        found = model(rows, noisy=torch.ones_like(rows, dtype=torch.bool), **beside).logits
        for row, logits in zip(rows, found, strict=True):
            text = torch.cat([tokens[0, :first], row])[None]
            seen = model(text, noisy=noisy_from(text, first), use_cache=False).logits[0, first:]
            differences.append(logits - seen)
        after = reader.states if first else []
        dirt += sum(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        at = torch.tensor([[0, place] for place in range(first, span.stop)])
        differences.append(reader.go_to(span.stop, at)[0] - whole[span])
    return largest(differences), dirt


@torch.no_grad()
def _apart(subject: Subject, batch: TextBatch, noise: Corruption) -> float:
    """Return the largest difference, in nats, between what training predicts and decoding does.

    Training reads a row of two documents and padding; decoding one document, its finished blocks
    clean and its present block noisy. The first token of a block is the base's.
    """
    objective = subject.objective
    laid_out = predict_behind_cache(batch, [noise], objective)
    nats, firsts = cached_nats(subject.model, laid_out, objective)
    hidden, size = corrupted(batch, noise, objective), objective.size
    expected = torch.full(batch.tokens.shape, torch.nan, dtype=nats.dtype)
    for segment in range(int(batch.segments.max()) + 1):
        columns = (batch.segments[0] == segment).nonzero().squeeze(-1)
        clean, noisy = batch.tokens[0, columns], hidden[0, columns]
        for first in range(0, len(columns), size):
            end = min(first + size, len(columns))
            text = torch.cat([clean[:first], noisy[first:end]])[None]
            told = noisy_from(text, first)
            logits = subject.model(text, noisy=told, use_cache=False).logits[0]
            begin = max(first, 1)
            found = cross_entropy(
                logits[begin - 1 : end - 1], clean[begin:end], objective.mask_token_id
            )
            expected[0, columns[begin:end]] = found
    learnt = nats - expected[0, laid_out.columns]
    return largest([learnt, firsts - expected[0, laid_out.first_places[:, 1]]])
