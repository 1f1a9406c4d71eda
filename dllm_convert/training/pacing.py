"""A time limit as a number of steps: from the speed of the first ones, once.

A training that is cut off by the clock ends in the middle of its learning rates. So the first steps
are timed, the rest is planned to fit, and the schedule ends with it. What was found is kept: a
training that is resumed, on whatever machine, has the same rates at the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from transformers import get_scheduler

from dllm_convert.recipe.schema import Training

_STEPS = 3
"""Least number of steps that are timed; the first one, which prepares much, is not counted."""
_SHARE = 0.05
"""Share of the time that is timed, or this long:"""
_SECONDS = 60.0
_PATIENCE = 0.25
"""Share of the time after which two steps have to do."""
_MARGIN = 1.03
"""What saving and a busier machine may add to a step."""


@dataclass(frozen=True)
class Pace:
    """What a time limit came to.

    Attributes:
        at: Steps that were taken when it was found out.
        steps: All steps of the training.
    """

    at: int
    steps: int

    def as_dict(self) -> dict[str, int]:
        """Return the fields for the journal."""
        return asdict(self)


def found_pace(
    durations: Sequence[float], seconds: float, step: int, limit: float, planned: int
) -> Pace | None:
    """Return how many steps fit; None if too little is known yet.

    Args:
        durations: What each step of this session took, in seconds.
        seconds: Training time so far, sessions before a resume included.
        step: Steps so far.
        limit: Seconds there are.
        planned: Most steps.
    """
    known = len(durations) >= _STEPS and seconds >= min(_SHARE * limit, _SECONDS)
    if not known and not (len(durations) >= 2 and seconds >= _PATIENCE * limit):
        return None
    left = max(limit - seconds, 0.0)
    more = int(left / (median(durations[1:]) * _MARGIN))
    return Pace(step, min(step + max(more, 1), max(planned, step)))


def warmup_steps(training: Training, steps: int) -> int:
    """Return how many of a training's steps warm up."""
    return round(training.warmup_ratio * steps)


def factors(training: Training, steps: int) -> Callable[[int], float]:
    """Return what the learning rate is multiplied by at each step of a training of so many."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule: Any = get_scheduler(
        training.lr_schedule,
        stand_in,
        num_warmup_steps=warmup_steps(training, steps),
        num_training_steps=steps,
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def end_with(scheduler: Any, pace: Pace, training: Training) -> None:
    """Have a scheduler's rates end with a pace: as planned up to where that was found out.

    Args:
        scheduler: Of the Trainer, a `LambdaLR` made for any number of steps.
        pace: What the time limit came to.
        training: The plan.
    """
    inner: Any = getattr(scheduler, "scheduler", scheduler)
    planned, timed = factors(training, training.steps), factors(training, pace.steps)

    def factor(step: int) -> float:
        return planned(step) if step <= pace.at else timed(step)

    inner.lr_lambdas = [factor for _ in inner.lr_lambdas]
    # A scheduler that was made for fewer steps has begun otherwise.
    now = factor(inner.last_epoch)
    for group, base in zip(inner.optimizer.param_groups, inner.base_lrs, strict=True):
        group["lr"] = base * now
    inner._last_lr = [base * now for base in inner.base_lrs]
