"""How likely a continuation is: a diffusion model's bound.

The bound of a continuation given its beginning is the NELBO of training with the beginning clean:
MDLM masks the continuation as a whole (LLaDA, arXiv 2502.09992, section 2.4), BD3LM bounds each of
its blocks given clean earlier blocks (arXiv 2503.09573), counted from position 0 of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dllm_convert.common.console import Task
from dllm_convert.common.terms import Behind
from dllm_convert.diffusion.corruption import Corruption, ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import next_token_nats, scored_nats
from dllm_convert.diffusion.objective import Objective, TextBatch

Masking = Literal["count", "time"]
"""`count`: k masked tokens without replacement, k uniform (LLaDA, equation 6); `time`: each token
masked independently at a drawn time (MDLM, equation 10). Two estimators of one bound."""


@dataclass(frozen=True)
class Continuation:
    """A text whose end is scored given its beginning.

    Attributes:
        tokens: The whole text.
        start: First scored token, at least 1: the first token of a text is given.
        item: Number of the question. Its noise is the same for each of its continuations, for every
            model and whatever the batch size (common random numbers).
    """

    tokens: tuple[int, ...]
    start: int
    item: int = 0

    def __post_init__(self) -> None:
        """Refuse what has no beginning.

        Raises:
            ValueError: If `start` is not a position between 1 and the length of the text.
        """
        if not 1 <= self.start <= len(self.tokens):
            raise ValueError(f"start is {self.start}, expected 1 to {len(self.tokens)}")

    @property
    def scored(self) -> int:
        """How many tokens are scored; an empty continuation has log-likelihood 0."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Estimator:
    """How the bound is estimated.

    Attributes:
        masking: Which of the two estimators.
        draws: Draws of noise per round: their noise levels are stratified, and in BD3LM they share
            one clean stream.
        seed: Seed of the noise.
        batch_size: Continuations per forward. Changes no score beyond rounding.
    """

    masking: Masking = "count"
    draws: int = 8
    seed: int = 0
    batch_size: int = 8

    @property
    def process(self) -> ForwardProcess:
        """The forward process, a view per draw."""
        return ForwardProcess(draw=self.masking, views=self.draws)

    def process_for(self, objective: Objective) -> ForwardProcess:
        """The forward process for an objective; without a mask it has its own discrete time."""
        if not objective.is_cross_entropy:
            return ForwardProcess(objective.schedule, views=self.draws)
        return self.process


def _batches(
    texts: Sequence[Continuation], size: int
) -> Iterator[tuple[list[int], list[Continuation]]]:
    """Yield numbers and texts of batches of similar length, the longest first.

    The longest first: what does not fit into memory fails at once, not after hours.
    """
    order = sorted(
        (number for number, text in enumerate(texts) if text.scored),
        key=lambda number: -len(texts[number].tokens),
    )
    for first in range(0, len(order), size):
        numbers = order[first : first + size]
        yield numbers, [texts[number] for number in numbers]


def _text_batch(texts: Sequence[Continuation]) -> TextBatch:
    """Return right-padded text; only continuations are scored."""
    width = max(len(text.tokens) for text in texts)
    index = torch.arange(width).expand(len(texts), -1)
    lengths = torch.tensor([len(text.tokens) for text in texts])[:, None]
    starts = torch.tensor([text.start for text in texts])[:, None]
    tokens = torch.tensor([[*text.tokens, *[0] * (width - len(text.tokens))] for text in texts])
    inside = index < lengths
    # A row's length is that of its own text, whatever stands beside it.
    positions = torch.where(inside, index, 0)
    return TextBatch(tokens, torch.where(inside, 0, -1), positions, inside & (index >= starts))


def _widen(corruption: Corruption, width: int) -> dict[str, torch.Tensor]:
    """Return the fields of a corruption of one row, padded to a width."""
    fields = {name: value for name, value in vars(corruption).items() if value is not None}
    return {
        name: torch.cat(
            [value, value.new_zeros(1, width - value.shape[1], *value.shape[2:])], dim=1
        )
        for name, value in fields.items()
    }


def _corrupt(
    texts: Sequence[Continuation],
    width: int,
    objective: Objective,
    estimator: Estimator,
    number: int,
) -> list[Corruption]:
    """Draw noise per text, so that it depends on the item and the round alone."""
    rows: list[list[dict[str, torch.Tensor]]] = []
    for text in texts:
        key = NoiseKey(estimator.seed, text.item, number, 1, "evaluate")
        views = corrupt(_text_batch([text]), objective, estimator.process_for(objective), key)
        rows.append([_widen(view, width) for view in views])
    return [
        Corruption(**{name: torch.cat([part[name] for part in view]) for name in view[0]})
        for view in zip(*rows, strict=True)
    ]


@torch.no_grad()
def score_round(
    model: Any,
    texts: Sequence[Continuation],
    objective: Objective,
    estimator: Estimator,
    number: int = 0,
    *,
    task: Task | None = None,
) -> torch.Tensor:
    """Estimate the bound of each continuation once per draw.

    Args:
        model: A diffusion model.
        texts: Continuations.
        objective: What the model was trained on.
        estimator: How the bound is estimated.
        number: Number of the round: another round has fresh noise.
        task: Progress to advance by one per continuation.

    Returns:
        Nats, an unbiased estimate of the NELBO each, shape (texts, draws), float64; 0 where nothing
        is scored.
    """
    found = torch.zeros(len(texts), estimator.draws, dtype=torch.float64)
    for numbers, group in _batches(texts, estimator.batch_size):
        clean = _text_batch(group)
        views = _corrupt(group, clean.tokens.shape[1], objective, estimator, number)
        scored = scored_nats(model, clean, views, objective)
        sums = torch.zeros(len(group), len(views), dtype=torch.float64)
        sums.index_put_((scored.rows, scored.views), scored.nats * scored.weight, accumulate=True)
        found[numbers] = sums
        if task is not None:
            task.advance(len(group))
    if task is not None:
        task.advance(sum(not text.scored for text in texts))
    return found


@torch.no_grad()
def verifier_nats(
    model: Any,
    behind: Behind,
    texts: Sequence[Continuation],
    *,
    batch_size: int,
    task: Task | None = None,
) -> tuple[torch.Tensor, list[bool]]:
    """Score each continuation as the verifier of lossless decoding does: autoregressively.

    Args:
        model: What goes on causally from clean tokens: a base that stayed, a model that was trained
            with a next-token loss, or another one.
        behind: How its clean tokens are read: through a mask, or behind a cache.
        texts: Continuations.
        batch_size: Continuations per forward.
        task: Progress to advance by one per continuation.

    Returns:
        Nats, exact, shape (texts,), float64, 0 where nothing is scored; and whether each token of a
        continuation is the likeliest, as greedy decoding would write it.
    """
    found = torch.zeros(len(texts), dtype=torch.float64)
    greedy = [True] * len(texts)
    for numbers, group in _batches(texts, batch_size):
        batch = _text_batch(group)
        rows = int(model.config.vocab_size)
        nats, owner, likeliest = next_token_nats(model, batch, rows, behind)
        found[numbers] = torch.zeros(len(group), dtype=torch.float64).index_add_(0, owner, nats)
        for place, number in enumerate(numbers):
            greedy[number] = bool(likeliest[owner == place].all())
        if task is not None:
            task.advance(len(group))
    return found, greedy


def cut_left(text: Continuation, context: int) -> Continuation:
    """Drop the beginning of a text that is longer than the model's context.

    Tokens that are scored stay as long as there is room, and at least one token before them.

    Args:
        text: A continuation.
        context: Tokens the model takes.
    """
    excess = len(text.tokens) - context
    if excess <= 0:
        return text
    start = max(text.start - excess, 1)
    return replace(text, tokens=text.tokens[-context:], start=start)
