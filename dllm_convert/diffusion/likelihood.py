"""Held-out likelihood: the diffusion bound, and the base model's own, over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from dllm_convert.common.console import Task
from dllm_convert.diffusion.attention import causal_mask
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
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
    if objective.kernel == "uniform":
        return ForwardProcess(objective.schedule)
    return ForwardProcess(draw="count")


def _on_cpu(batch: TextBatch) -> TextBatch:
    # Noise is drawn and rows are laid out there: a GPU would be waited for at every count.
    return batch.to(torch.device("cpu"))


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
            laid_out = predict(batch, corrupt(batch, objective, process, key), objective)
            forward = laid_out.to(device_of(model))
            mask = forward.dense_mask()
            logits = model(**forward.inputs, attention_mask=mask, use_cache=False).logits
            nats = forward.nats(logits, objective) * forward.weight
            sums[number].index_add_(0, laid_out.rows, nats.cpu().double())
            if task is not None:
                task.advance()
        totals += sums.mean(0).tolist()
        counts += scorable.sum(-1).tolist()
    found = _summary(totals, counts)
    if rows == 1 and draws > 1:
        # Of one sequence nothing is known but how much its draws differ.
        spread = float(sums.sum(-1).std()) / math.sqrt(draws)
        found = replace(found, stderr=spread / found.tokens)
    return found


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
    rows = sum(len(batch.tokens) for batch in batches)
    totals: list[list[float]] = [[] for _ in rates]
    counts: list[list[int]] = [[] for _ in rates]
    for batch in map(_on_cpu, batches):
        key = NoiseKey(seed, 0, len(totals[0]), rows, "measure")
        views = [view for one in processes for view in corrupt(batch, objective, one, key)]
        laid_out = predict(batch, views, objective)
        forward = laid_out.to(device_of(model))
        mask = forward.dense_mask()
        logits = model(**forward.inputs, attention_mask=mask, use_cache=False).logits
        # Scored positions come view by view.
        parts = [int(view.scored.sum()) for view in views]
        nats = forward.nats(logits, objective).cpu().double()
        texts = laid_out.rows
        pairs = zip(torch.split(nats, parts), torch.split(texts, parts), strict=True)
        for number, (part, rows_of) in enumerate(pairs):
            sums = torch.zeros(len(batch.tokens), dtype=torch.float64)
            sums.index_add_(0, rows_of, part)
            totals[number] += sums.tolist()
            counts[number] += views[number].scored.sum(-1).tolist()
    return tuple(
        _summary(total, count) if sum(count) else None
        for total, count in zip(totals, counts, strict=True)
    )


@torch.no_grad()
def autoregressive_nll(
    model: Any, batches: Sequence[TextBatch], rows: int, *, task: Task | None = None
) -> Likelihood:
    """Exact negative log-likelihood of the base, read through a causal 4-D mask.

    Args:
        model: An untrained conversion of an autoregressive model: its weights are the base's.
        batches: Held-out text.
        rows: Rows of the base's vocabulary; a row added for the mask is not the base's to predict.
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
        nats, owner, _ = next_token_nats(model, batch, rows)
        sums = torch.zeros(len(batch.tokens), dtype=torch.float64)
        totals += sums.index_add_(0, owner, nats).tolist()
        counts += batch.scorable.sum(-1).tolist()
        if task is not None:
            task.advance()
    return _summary(totals, counts)


def next_token_nats(
    model: Any, batch: TextBatch, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict every scorable token from those before it, through a causal mask.

    Args:
        model: An untrained conversion of an autoregressive model.
        batch: Text.
        rows: Rows of the base's vocabulary.

    Returns:
        Of each scorable token its negative log-likelihood in nats, float64, the row it stands in,
        and whether it is the likeliest, each of shape (scorable tokens,), on the CPU.
    """
    batch, device = _on_cpu(batch), device_of(model)
    texts, columns = batch.scorable.nonzero(as_tuple=True)
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
