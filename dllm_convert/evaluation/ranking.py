"""Which of several continuations is the likeliest, with as many draws as that takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.common.console import Task
from dllm_convert.diffusion.objective import Objective
from dllm_convert.evaluation.continuation import Continuation, Estimator, score_round


@dataclass(frozen=True)
class Budget:
    """When to stop drawing.

    Attributes:
        rounds: Most rounds of draws per question.
        confidence: Probability with which a ranking that was decided early is that of all draws'
            expectations; 1 never stops early.
    """

    rounds: int = 8
    confidence: float = 1.0


@dataclass(frozen=True)
class Scored:
    """Scores of all continuations.

    Attributes:
        nats: Mean over draws of the estimated bound, shape (texts,), float64.
        stderr: Its standard error over draws, as if they were independent; shape (texts,).
        draws: Draws per continuation, shape (texts,), int.
        most: Draws that every continuation would have had without stopping early.
    """

    nats: torch.Tensor
    stderr: torch.Tensor
    draws: torch.Tensor
    most: int

    @property
    def saving(self) -> float:
        """Share of the draws that stopping early saved."""
        total = self.most * len(self.draws)
        return 1 - float(self.draws.sum()) / total if total else 0.0


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: Between 0 and 1.
        freedom: Degrees of freedom, at least 1.
    """
    # lm-eval, without which nothing is ranked, brings scipy.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def is_decided(draws: torch.Tensor, scales: Sequence[torch.Tensor], risk: float) -> bool:
    """Whether it is settled which continuation has the lowest expected bound.

    The best is compared with each rival by the paired difference of their draws, which share their
    noise; the risk is divided over rivals and scales (Bonferroni).

    Args:
        draws: Nats, shape (continuations, draws).
        scales: What the nats are divided by, shape (continuations,) each: 1 for the likelihood,
            the length for one per character. All rankings have to be settled.
        risk: Probability of being wrong that is allowed.
    """
    count, number = draws.shape
    if count < 2:
        return True
    if number < 2:
        return False
    limit = student_quantile(1 - risk / (len(scales) * (count - 1)), number - 1)
    for scale in scales:
        scaled = draws / scale[:, None]
        best = int(scaled.mean(-1).argmin())
        rivals = torch.arange(count) != best
        behind = scaled[rivals] - scaled[best]
        error = behind.std(-1) / math.sqrt(number)
        if not bool((behind.mean(-1) > limit * error).all()):
            return False
    return True


def score(
    model: Any,
    texts: Sequence[Continuation],
    objective: Objective,
    estimator: Estimator,
    budget: Budget,
    *,
    characters: Mapping[int, int] | None = None,
    task: Task | None = None,
) -> Scored:
    """Estimate the bound of continuations, no longer than their ranking needs.

    Continuations with the same `item` are choices of one question.

    Args:
        model: A diffusion model.
        texts: Continuations.
        objective: What the model was trained on.
        estimator: How the bound is estimated.
        budget: When to stop.
        characters: Length of each continuation's text by its number in `texts`: the ranking per
            character has to be settled too, which is what `acc_norm` reads.
        task: Progress to advance by one per continuation and round, rounds that are not needed
            included.

    Returns:
        Nats and what they took.
    """
    drawn = [torch.empty(0, dtype=torch.float64) for _ in texts]
    questions: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        questions.setdefault(text.item, []).append(number)
    open_ = dict(questions)
    # Every look at the data is a chance to be wrong: the risk is divided over them.
    risk = (1 - budget.confidence) / max(budget.rounds - 1, 1)
    for round_ in range(budget.rounds):
        numbers = sorted(number for choices in open_.values() for number in choices)
        found = score_round(
            model, [texts[n] for n in numbers], objective, estimator, round_, task=task
        )
        for number, values in zip(numbers, found, strict=True):
            drawn[number] = torch.cat([drawn[number], values])
        if risk > 0:
            open_ = {
                item: choices
                for item, choices in open_.items()
                if len(choices) < 2 or not _settled(drawn, choices, characters, risk)
            }
        if task is not None:
            settled = len(numbers) - sum(map(len, open_.values()))
            task.advance(settled * (budget.rounds - 1 - round_))
        if not open_:
            break
    return _summary(drawn, budget.rounds * estimator.draws)


def _settled(
    drawn: Sequence[torch.Tensor],
    choices: Sequence[int],
    characters: Mapping[int, int] | None,
    risk: float,
) -> bool:
    scales = [torch.ones(len(choices), dtype=torch.float64)]
    if characters is not None:
        lengths = [max(characters[number], 1) for number in choices]
        scales.append(torch.tensor(lengths, dtype=torch.float64))
    return is_decided(torch.stack([drawn[number] for number in choices]), scales, risk)


def _summary(drawn: Sequence[torch.Tensor], most: int) -> Scored:
    counts = torch.tensor([len(values) for values in drawn])
    means = torch.stack([values.mean() for values in drawn]) if drawn else torch.empty(0)
    errors = [
        values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.inf)
        for values in drawn
    ]
    stderr = torch.stack([error.double() for error in errors]) if errors else torch.empty(0)
    return Scored(means, stderr, counts, most)
