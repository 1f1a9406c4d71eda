"""Held-out likelihood: the diffusion bound, and the base model's own, over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from dllm_convert.common.console import Task
from dllm_convert.common.terms import Behind
from dllm_convert.diffusion.attention import causal_mask
from dllm_convert.diffusion.cached import cached_nats, clean_logits, predict_behind_cache
from dllm_convert.diffusion.corruption import Corruption, ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.device import device_of, moved
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import predict
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.errors import DataError


@dataclass(frozen=True)
class Likelihood:
    """A mean over tokens.

    Attributes:
        nats_per_token: Mean negative log-likelihood, or its bound, in nats per token.
        stderr: Standard error of that mean over sequences and draws, in nats per token; of a single
            sequence over draws.
        tokens: Tokens it was measured on.
    """

    nats_per_token: float
    stderr: float
    tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields for the manifest; None for the standard error of one sequence."""
        return {**asdict(self), "stderr": self.stderr if math.isfinite(self.stderr) else None}


def _check_scored(batches: Sequence[TextBatch]) -> None:
    if any(bool(batch.scorable.any()) for batch in batches):
        return
    rows = sum(len(batch.tokens) for batch in batches)
    raise DataError(
        f"none of {rows} rows of held-out text has a token that is scored",
        hint="Hold out more or longer text, or let more of it be scored: a longer "
        "data.sequence_length, or data.scored_turns: all",
    )


def _summary(totals: list[float], counts: list[int]) -> Likelihood:
    """Ratio of sums over sequences, with the standard error of a ratio estimator."""
    tokens = sum(counts)
    mean = sum(totals) / tokens
    if len(totals) < 2:
        return Likelihood(mean, math.inf, tokens)
    spread = sum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return Likelihood(mean, math.sqrt(spread * len(totals) / (len(totals) - 1)) / tokens, tokens)


def measured_process(objective: Objective) -> ForwardProcess:
    """Return the process whose loss is an exact bound with the least variance."""
    if not objective.is_cross_entropy:
        return ForwardProcess(objective.schedule)
    return ForwardProcess(draw="count")


def _on_cpu(batch: TextBatch) -> TextBatch:
    # Noise is drawn and rows are laid out there: a GPU would be waited for at every count.
    return batch.to(torch.device("cpu"))


@dataclass(frozen=True)
class ScoredNats:
    """What predictions of corrupted tokens cost.

    Attributes:
        nats: Cross-entropies, or terms of the bound, not weighted, shape (n,), float64.
        weight: What each weighs in the NELBO, shape (n,), float64.
        rows: Row of the text of each, shape (n,).
        views: Draw of noise of each, shape (n,).
    """

    nats: torch.Tensor
    weight: torch.Tensor
    rows: torch.Tensor
    views: torch.Tensor


@torch.no_grad()
def scored_nats(
    model: Any, batch: TextBatch, views: Sequence[Corruption], objective: Objective
) -> ScoredNats:
    """Predict all that draws of noise score of a text.

    Args:
        model: A diffusion model.
        batch: Text, on the CPU.
        views: Draws of noise over it.
        objective: mdlm or bd3lm.

    Returns:
        Their costs, on the CPU.
    """
    if objective.behind == "cache":
        behind = predict_behind_cache(batch, views, objective)
        nats, firsts = cached_nats(model, behind, objective)
        # What the base predicts by itself is scored by the draws that hide it: (m,), view by view.
        row, column = behind.first_places.unbind(1)
        hidden = torch.stack([view.scored[row, column] for view in views])
        weights = torch.stack([view.weight[row, column] for view in views])
        number, which = hidden.nonzero(as_tuple=True)
        return ScoredNats(
            torch.cat([nats.cpu(), firsts.cpu()[which]]).double(),
            torch.cat([behind.weight, weights[number, which]]).double(),
            torch.cat([behind.rows, row[which]]),
            torch.cat([behind.views, number]),
        )
    laid_out = predict(batch, views, objective)
    forward = laid_out.to(device_of(model))
    mask = forward.dense_mask()
    logits = model(**forward.inputs, attention_mask=mask, use_cache=False).logits
    # Scored positions come view by view.
    parts = torch.tensor([int(view.scored.sum()) for view in views])
    return ScoredNats(
        forward.nats(logits, objective).cpu().double(),
        laid_out.weight.double(),
        laid_out.rows,
        torch.arange(len(views)).repeat_interleave(parts),
    )


@torch.no_grad()
def nelbo(
    model: Any,
    batches: Sequence[TextBatch],
    objective: Objective,
    *,
    seed: int,
    draws: int = 1,
    task: Task | None = None,
) -> Likelihood:
    """Estimate the negative evidence lower bound of a diffusion model.

    Common random numbers: the same seed corrupts the same tokens whatever the batch size is, so two
    models, or one before and after training, differ by the model only. The uniform kernel's bound
    is measured in its discrete time.

    Args:
        model: A diffusion model.
        batches: Held-out text.
        objective: mdlm or bd3lm.
        seed: Seed of the noise.
        draws: Noise draws per batch.
        task: Progress to advance by one per batch and draw.

    Returns:
        Nats per token; an upper bound of the negative log-likelihood.

    Raises:
        DataError: No token is scored.
    """
    _check_scored(batches)
    process = measured_process(objective)
    rows = sum(len(batch.tokens) for batch in batches)
    totals: list[float] = []
    counts: list[int] = []
    for batch in map(_on_cpu, batches):
        scorable = batch.scorable
        sums = torch.zeros(draws, len(batch.tokens), dtype=torch.float64)
        for number in range(draws):
            key = NoiseKey(seed, number, len(totals), rows, "measure")
            found = scored_nats(model, batch, corrupt(batch, objective, process, key), objective)
            sums[number].index_add_(0, found.rows, found.nats * found.weight)
            if task is not None:
                task.advance()
        totals += sums.mean(0).tolist()
        counts += scorable.sum(-1).tolist()
    bound = _summary(totals, counts)
    if rows == 1 and draws > 1:
        # Of one sequence nothing is known but how much its draws differ.
        spread = float(sums.sum(-1).std()) / math.sqrt(draws)
        bound = replace(bound, stderr=spread / bound.tokens)
    return bound


@torch.no_grad()
def nats_at_rate(
    model: Any,
    batches: Sequence[TextBatch],
    objective: Objective,
    rates: Sequence[float],
    *,
    seed: int,
) -> tuple[Likelihood | None, ...]:
    """Estimate the mean cross-entropy of masked tokens where a fixed share of the text is masked.

    Its integral over all rates is the NELBO: with the linear schedule a token is masked with
    probability t and weighs 1/t. All rates run in one forward, as views of the same text, and share
    their random numbers: what is masked at one rate is masked at every higher one.

    Args:
        model: A diffusion model.
        batches: Held-out text.
        objective: mdlm or bd3lm with the absorbing kernel.
        rates: Shares of the tokens that are masked, in (0, 1].
        seed: Seed of the noise.

    Returns:
        Nats per masked token for each rate; None where no token was masked.
    """
    processes = [ForwardProcess(Schedule(min_time=rate, max_time=rate)) for rate in rates]
    # A rate is of all words, whatever classes a schedule has.
    objective = replace(objective, classes=None)
    rows = sum(len(batch.tokens) for batch in batches)
    totals: list[list[float]] = [[] for _ in rates]
    counts: list[list[int]] = [[] for _ in rates]
    for batch in map(_on_cpu, batches):
        key = NoiseKey(seed, 0, len(totals[0]), rows, "measure")
        views = [view for one in processes for view in corrupt(batch, objective, one, key)]
        found = scored_nats(model, batch, views, objective)
        for number in range(len(views)):
            own = found.views == number
            sums = torch.zeros(len(batch.tokens), dtype=torch.float64)
            sums.index_add_(0, found.rows[own], found.nats[own])
            totals[number] += sums.tolist()
            counts[number] += views[number].scored.sum(-1).tolist()
    return tuple(
        _summary(total, count) if sum(count) else None
        for total, count in zip(totals, counts, strict=True)
    )


@torch.no_grad()
def autoregressive_nll(
    model: Any,
    batches: Sequence[TextBatch],
    rows: int,
    *,
    behind: Behind = "mask",
    task: Task | None = None,
) -> Likelihood:
    """Exact negative log-likelihood of the base, read through a causal 4-D mask.

    Args:
        model: An untrained conversion of an autoregressive model: its weights are the base's.
        batches: Held-out text.
        rows: Rows of the base's vocabulary; a row added for the mask is not the base's to predict.
        behind: `cache` of a family that takes no such mask: its documents are read one by one.
        task: Progress to advance by one per batch.

    Returns:
        Nats per token over the tokens `nelbo` counts.

    Raises:
        DataError: No token is scored.
    """
    _check_scored(batches)
    totals: list[float] = []
    counts: list[int] = []
    for batch in batches:
        nats, owner, _ = next_token_nats(model, batch, rows, behind)
        sums = torch.zeros(len(batch.tokens), dtype=torch.float64)
        totals += sums.index_add_(0, owner, nats).tolist()
        counts += batch.scorable.sum(-1).tolist()
        if task is not None:
            task.advance()
    return _summary(totals, counts)


def next_token_nats(
    model: Any, batch: TextBatch, rows: int, behind: Behind = "mask"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict every scorable token from those before it, through a causal mask.

    Args:
        model: An untrained conversion of an autoregressive model.
        batch: Text.
        rows: Rows of the base's vocabulary.
        behind: As in `autoregressive_nll`.

    Returns:
        Of each scorable token its negative log-likelihood in nats, float64, the row it stands in,
        and whether it is the likeliest, each of shape (scorable tokens,), on the CPU.
    """
    batch, device = _on_cpu(batch), device_of(model)
    texts, columns = batch.scorable.nonzero(as_tuple=True)
    if behind == "cache":
        logits = clean_logits(model, batch)[:, :rows]
    else:
        logits = model(
            input_ids=moved(batch.tokens, device),
            attention_mask=causal_mask(moved(batch.segments, device)),
            position_ids=moved(batch.positions, device),
            logits_at=moved(texts * batch.tokens.shape[1] + columns - 1, device),
            use_cache=False,
        ).logits[:, :rows]
    targets = moved(batch.tokens[texts, columns], device)
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    return nats.cpu().double(), texts, (logits.argmax(-1) == targets).cpu()
