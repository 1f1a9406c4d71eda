"""What an untrained conversion should show at step 0, and why a run shows something else.

The loss has an expected value: that of the conversion on held-out text, measured before training.
A guess that takes every token for equally likely costs ln(vocabulary); a conversion that is worse
than that by far is wrong about something, and confidently so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.training.data.text_facts import Text

WORSE_THAN_GUESSING = 2.0
"""Nats above ln(vocabulary) from which a conversion is taken for a broken one."""
MASK_ROW = (0.01, 10.0)
"""Norm of the mask's row, of the mean of used rows, that is taken for a sound one. Unused rows of
published models are close to zero (LLaDA 2); a mean of random rows is at 1/sqrt(rows)."""
EXPLAINED = 0.5
"""Share of what is worse than guessing that the other token shift has to take away."""
SPREADS = 3.0
SLACK = (1.0, 0.5)
"""Nats below and above the expected range that are not far outside: a spread measured on few
sequences is itself uncertain, and a training that learns fast gets lower at once."""
FIRST_LINES = 3


@torch.no_grad()
def mask_row_ratio(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    mask_token_id: int,
    batches: Sequence[TextBatch],
) -> float:
    """Return the norm of the mask's row over the mean norm of the rows that the text uses.

    Args:
        embeddings: Input embeddings, shape (vocabulary, hidden).
        mask: What stands for the mask: its row, or a vector of its own; (hidden,).
        mask_token_id: The mask.
        batches: Text that says which rows are used.
    """
    tokens = torch.cat([batch.tokens[batch.segments >= 0] for batch in batches])
    used = torch.unique(tokens)
    used = used[used != mask_token_id].to(embeddings.device)
    norms = embeddings[used].float().norm(dim=-1)
    return float(mask.float().norm() / norms.mean())


@dataclass(frozen=True)
class Start:
    """What the untrained conversion shows.

    Attributes:
        nelbo: Its NELBO on held-out text, nats per token.
        stderr: Standard error of that; infinite where one sequence does not tell.
        tokens: Tokens it was measured on.
        guess: What guessing uniformly costs, ln(vocabulary), nats per token.
        ar_nll: The base's own NLL on the same tokens, if it is autoregressive.
        mask_row: See `mask_row_ratio`.
        problems: What looks wrong, the likeliest cause first; empty if nothing does.
    """

    nelbo: float
    stderr: float
    tokens: int
    guess: float
    ar_nll: float | None
    mask_row: float
    problems: tuple[str, ...] = ()

    @property
    def broken(self) -> bool:
        """Whether it is far worse than guessing."""
        return not self.nelbo <= self.guess + WORSE_THAN_GUESSING

    def spread(self, tokens: int, noise_variance: float) -> float:
        """Return the standard deviation of a training batch's NELBO, in nats per token.

        Args:
            tokens: Scored tokens of the batch.
            noise_variance: See `noise_variance`.
        """
        texts = self.stderr**2 * self.tokens / tokens
        masks = self.nelbo**2 * noise_variance / tokens
        return math.sqrt(self.stderr**2 + texts + masks)


def noise_variance(schedule: Schedule, *, by_count: bool) -> float:
    """Return the variance that drawing masks adds, per token, for a loss of one nat everywhere.

    A token masked with probability p and weighted with w contributes w^2 p (1 - p); drawing how
    many are masked instead of the time removes that.

    Args:
        schedule: Noise schedule.
        by_count: Whether the number of masked tokens is drawn.
    """
    if by_count:
        return 0.0
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = schedule.min_time + (schedule.max_time - schedule.min_time) * even
    p = schedule.mask_probability(t)
    return float((schedule.weight(t) ** 2 * p * (1 - p)).mean())


def survey(
    model: Any,
    batches: Sequence[TextBatch],
    measured: Mapping[str, Mapping[str, Any]],
    text: Text,
    *,
    seed: int,
) -> Start:
    """Compare the untrained conversion with what it should show, and look for the cause.

    The causes are looked for in the order in which conversions go wrong: the mask's row, the token
    shift, the data. The other shift is measured, on one batch, only where this one is no better
    than guessing.

    Args:
        model: The untrained conversion.
        batches: Held-out text.
        measured: `nelbo_before` and, of an autoregressive base, `ar_nll`.
        text: What the text is made of.
        seed: Seed of the noise.
    """
    objective = Objective.from_config(model.config)
    before, base = measured["nelbo_before"], measured.get("ar_nll")
    layer = model.get_input_embeddings()
    embeddings, mask = layer.weight, objective.mask_token_id
    vector = layer.mask_vector if objective.is_gated else embeddings[mask]
    row = mask_row_ratio(embeddings, vector, mask, batches)
    start = Start(
        before["nats_per_token"],
        math.inf if before["stderr"] is None else before["stderr"],
        int(before["tokens"]),
        math.log(len(embeddings)),
        base["nats_per_token"] if base else None,
        row,
    )
    problems = [] if MASK_ROW[0] <= row <= MASK_ROW[1] else [_mask_row(row, objective)]
    if start.nelbo > start.guess and not objective.is_gated:
        problems += _shift(model, batches[:1], objective, seed)
    problems += text.problems
    if before["stderr"] is None:
        problems.append(
            f"data: one sequence of {start.tokens:,} scored tokens is held out, too little to tell "
            "how far its likelihoods are off; give more text, or --set data.held_out_source=SPEC"
        )
    return replace(start, problems=tuple(problems))


def _mask_row(ratio: float, objective: Objective) -> str:
    return (
        f"mask row: the embedding of token {objective.mask_token_id} has {ratio:.3g} of the mean "
        f"norm of used rows, expected {MASK_ROW[0]:g} to {MASK_ROW[1]:g}; leave mask_token.id "
        "to the rules, or name a token that was trained"
    )


def _shift(model: Any, batches: Sequence[TextBatch], objective: Objective, seed: int) -> list[str]:
    other = replace(objective, token_shift=not objective.token_shift)
    ours, theirs = (
        nelbo(model, batches, one, seed=seed).nats_per_token for one in (objective, other)
    )
    guess = math.log(len(model.get_input_embeddings().weight))
    if ours - theirs < max(WORSE_THAN_GUESSING, EXPLAINED * (ours - guess)):
        return []
    names = {True: "keep", False: "drop"}
    return [
        f"token shift: {names[other.token_shift]} gives {theirs:.2f} nats per token where "
        f"{names[objective.token_shift]} gives {ours:.2f}; "
        f"--set token_shift={names[other.token_shift]}"
    ]


class StartCheck:
    """Watches the first lines of a training for a loss that starts elsewhere than expected.

    The median of the first three: weights of 1/t make single steps jump.

    Args:
        start: What the untrained conversion shows.
        tokens: Scored tokens of a line.
        variance: See `noise_variance`.
    """

    def __init__(self, start: Start, tokens: int, variance: float) -> None:
        self.start = start
        self._spread = SPREADS * start.spread(tokens, variance)
        self._seen: list[float] = []

    @property
    def range(self) -> tuple[float, float]:
        """Where the NELBO of a first step is expected, in nats per token."""
        return max(0.0, self.start.nelbo - self._spread), self.start.nelbo + self._spread

    def announce(self) -> str:
        """Say what is expected, on one line."""
        low, high = self.range
        base = f", the base's AR NLL {self.start.ar_nll:.2f}" if self.start.ar_nll else ""
        expected = f"NELBO {low:.2f} to {high:.2f} nats per token"
        if math.isinf(high):
            expected = "nobody can tell which NELBO"
        return (
            f"expected at step 0: {expected} (untrained "
            f"{self.start.nelbo:.2f} on held-out text, guessing {self.start.guess:.2f}{base})"
        )

    def see(self, value: float) -> str | None:
        """Take the NELBO of the next line; return a warning if the first lines are far off."""
        if len(self._seen) >= FIRST_LINES:
            return None
        self._seen.append(value)
        if len(self._seen) == FIRST_LINES and not any(self._seen):
            # A likelihood of exactly 1 is none that a model gives.
            return (
                "training starts with a loss of 0: no token of its rows is trained, so it learns "
                "nothing. Texts of one or two tokens have none, nor has what the base alone writes"
            )
        low, high = self.range
        found = median(self._seen)
        near = low - SLACK[0] <= found <= high + SLACK[1]
        if len(self._seen) < FIRST_LINES or near:
            return None
        if found < low:
            cause = "is the training text much simpler than the held-out text, or part of it?"
        else:
            cause = (
                "held-out text did better before training: compare it with the training text, then "
                "look at training.precision=fp32 and at training.learning_rate"
            )
        return (
            f"training starts at a NELBO of {found:.2f} nats per token, expected {low:.2f} to "
            f"{high:.2f}; {'; '.join(self.start.problems) or cause}"
        )


def explain(start: Start) -> list[str]:
    """Return what to warn of before training, nothing if the conversion looks sound."""
    if not start.broken:
        return list(start.problems)
    head = (
        f"the untrained conversion has a NELBO of {start.nelbo:.2f} nats per token, guessing has "
        f"{start.guess:.2f}: something is wrong"
    )
    if start.problems:
        return [f"{head}; {problem}" for problem in start.problems]
    return [
        f"{head}, and neither the mask's row ({start.mask_row:.2g} of the mean norm), nor the "
        "token shift, nor the text explains it; look at the base's weights and at token_shift"
    ]
