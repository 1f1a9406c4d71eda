"""How long to train, as it is typed: tokens, time, sequences per step."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dllm_convert.common.counts import LARGEST_COUNT, LARGEST_TOKENS, LONGEST_MINUTES
from dllm_convert.errors import IncompatibleError, RequestError

if TYPE_CHECKING:
    from dllm_convert.recipe.schema import Recipe

MOST_EPOCHS = 20
"""Times that a training may read its text unasked. Beyond 4 repeated tokens are worth less than new
ones, beyond 16 next to nothing (Muennighoff et al., arXiv 2305.16264, of autoregressive models)."""
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0, "d": 1440.0}
_STEPS, _TOKENS, _MAX, _BATCH, _ACCUMULATION = (
    f"training.{name}"
    for name in ("steps", "tokens", "max_minutes", "batch_size", "gradient_accumulation")
)


@dataclass(frozen=True)
class Budget:
    """What was typed about the length of a training.

    Attributes:
        tokens: Tokens of all steps over all processes, padding included; None if not typed.
        minutes: Training time after which to stop.
        global_batch: Sequences of an optimizer step over all processes.
    """

    tokens: int | None = None
    minutes: float | None = None
    global_batch: int | None = None

    @classmethod
    def parse(cls, tokens: str | None, max_time: str | None, global_batch: int | None) -> Budget:
        """Read what was typed.

        Raises:
            RequestError: It is no number, or no time.
        """
        return cls(
            None if tokens is None else parse_count(tokens),
            None if max_time is None else parse_minutes(max_time),
            global_batch,
        )

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the recipe that are thereby typed; `applied_to` corrects the accumulation."""
        found: dict[str, Any] = {_MAX: self.minutes, _TOKENS: self.tokens}
        found[_ACCUMULATION] = self.global_batch and 1
        return {field: value for field, value in found.items() if value is not None}

    def refuse_beside(self, steps: int | None, assigned: Collection[str]) -> None:
        """Refuse options that say the same twice.

        Raises:
            RequestError: There are such.
        """
        pairs = (
            ("`tokens`", self.tokens is not None, "`steps`", steps is not None),
            ("`tokens`", self.tokens is not None, f"`overrides` {_STEPS}", _STEPS in assigned),
            ("`tokens`", self.tokens is not None, f"`overrides` {_TOKENS}", _TOKENS in assigned),
            (f"`overrides` {_TOKENS}", _TOKENS in assigned, "`steps`", steps is not None),
            (
                f"`overrides` {_TOKENS}",
                _TOKENS in assigned,
                f"`overrides` {_STEPS}",
                _STEPS in assigned,
            ),
            ("`max_time`", self.minutes is not None, f"`overrides` {_MAX}", _MAX in assigned),
            (
                "`global_batch`",
                self.global_batch is not None,
                f"`overrides` {_ACCUMULATION}",
                _ACCUMULATION in assigned,
            ),
        )
        for first, one, second, other in pairs:
            if one and other:
                raise RequestError(f"give one of {first} and {second}")

    def applied_to(self, recipe: Recipe, processes: int, assigned: Collection[str]) -> Recipe:
        """Return a recipe with so many sequences a step, whose steps read its budget of tokens.

        Args:
            recipe: It was resolved with `fields`.
            processes: How many train.
            assigned: Fields that were typed with `--set`.

        Raises:
            IncompatibleError: Blocks would grow for longer than the budget lasts.
            RequestError: The sequences cannot be shared out.
        """
        training = recipe.training
        if self.global_batch is not None:
            training = training.model_copy(
                update=_shared(
                    self.global_batch, training.batch_size, processes, fixed=_BATCH in assigned
                )
            )
        found = paced(recipe.model_copy(update={"training": training}), processes)
        _check_growth(found)
        return found


def _check_growth(recipe: Recipe) -> None:
    training, grown = recipe.training, recipe.training.block_growth.steps
    if training.tokens is not None and recipe.growing_sizes and grown >= training.steps:
        raise IncompatibleError(
            f"training.tokens comes to {training.steps:,} steps, and blocks would grow for "
            f"{grown:,} of them and never have their size",
            hint=f"--set training.block_growth.steps={max(1, training.steps // 2)}, or more "
            "--tokens",
        )


def paced(recipe: Recipe, processes: int) -> Recipe:
    """Return a recipe whose steps read its `training.tokens`; without such a budget the same.

    However many processes share a training, it reads the same number of tokens.

    Args:
        recipe: Its batch is that of one process.
        processes: How many train.

    Raises:
        RequestError: It takes more steps than a recipe can have.
    """
    training = recipe.training
    if training.tokens is None:
        return recipe
    per_step = training.sequences_per_step * processes * recipe.data.sequence_length
    steps = math.ceil(training.tokens / per_step)
    if steps > LARGEST_COUNT:
        raise RequestError(
            f"it takes {steps:,} steps, expected at most {LARGEST_COUNT:,}: give fewer tokens, or "
            "larger batches",
            argument="tokens",
        )
    return recipe.model_copy(update={"training": training.model_copy(update={"steps": steps})})


def _shared(
    total: int, batch: int | Literal["auto"], processes: int, *, fixed: bool
) -> dict[str, int]:
    """Share sequences out over processes and forwards, of at most `batch` sequences each."""
    if total % processes:
        raise RequestError(
            f"{total} sequences cannot be shared by {processes} processes alike; "
            f"{total - total % processes or processes} can",
            argument="global_batch",
        )
    own = total // processes
    if batch == "auto":
        return {"gradient_accumulation": own}
    sizes = [batch] if fixed else range(min(batch, own), 0, -1)
    size = next((size for size in sizes if own % size == 0), None)
    if size is None:
        raise RequestError(
            f"{own} sequences per process are no multiple of {_BATCH} {batch}, as `overrides` says",
            argument="global_batch",
        )
    return {"batch_size": size, "gradient_accumulation": own // size}


def parse_count(text: str) -> int:
    """Return a number such as 5M, 1.5B, 200k or 300000.

    Raises:
        RequestError: It is none, or less than one.
    """
    match = re.fullmatch(r"(\d+(?:[_,]\d{3})*(?:\.\d+)?)\s*([kmbgt]?)", text.strip().lower())
    value = float(re.sub("[_,]", "", match[1])) * _COUNTS[match[2]] if match else 0
    if not 1 <= value < LARGEST_TOKENS:
        raise RequestError(f"{text!r} is no number of tokens, as in 5M or 1.5B", argument="tokens")
    return round(value)


def parse_minutes(text: str) -> float:
    """Return the minutes of a time such as 90m, 2h, 1h30m or 45s.

    Raises:
        RequestError: It is none, or has no unit.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip().lower())
    whole = re.fullmatch(r"(?:\s*\d+(?:\.\d+)?\s*[smhd])+", text.strip().lower())
    minutes = sum(float(number) * _MINUTES[unit] for number, unit in parts) if whole else 0.0
    if not 0 < minutes <= LONGEST_MINUTES:
        raise RequestError(f"{text!r} is no time, as in 90m, 2h or 1h30m", argument="max_time")
    return minutes
