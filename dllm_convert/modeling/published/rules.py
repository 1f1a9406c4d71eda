"""What a text may hold beside what the model says: transformers' logits processors, denoising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

from .moving import sent

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A `LogitsProcessor` of transformers: ids (n, length) and logits (n, vocab) to other logits."""


@dataclass(frozen=True)
class TextRules:
    """Changes to the logits before a token is chosen, and to what is drawn from.

    They make another distribution, as guidance does: how sure the model is is measured on it. All
    but the last three hold wherever a position is, so that many are written in one forward; what a
    processor says of a token depends on all before it, so they are written from left to right,
    one in a forward.

    Attributes:
        repetition_penalty: Divides the odds of tokens that the row holds already, prompt included.
        token_bias: Added to the logits of single tokens: ids and how much; -inf bans one.
        min_new_tokens: New tokens before which no text ends.
        begin_suppress_tokens: Ids that are not the first new token.
        forced_last: Ids of which the last new token is one; none: any.
        decay: New tokens from which on an end becomes likelier, and the factor by which.
        is_finite: Whether logits that are no numbers, or infinite, are made finite.
        top_h: Draw from tokens that hold this share of the entropy (arXiv 2509.02510).
        typical_p: Draw from the most typical tokens that hold this probability (arXiv 2202.00666).
        epsilon_cutoff: Draw from tokens at least this likely (arXiv 2210.15191).
        eta_cutoff: The same, less where the entropy is large.
        processors: Asked with the ids before a token, row by row.
        allowed: Row and ids before a token to the ids that may follow.
        custom: The caller's own processors, asked last.
    """

    repetition_penalty: float = 1.0
    token_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_last: tuple[int, ...] = ()
    decay: tuple[int, float] | None = None
    is_finite: bool = False
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    processors: tuple[Processor, ...] = ()
    allowed: Callable[[int, torch.Tensor], list[int]] | None = None
    custom: tuple[Processor, ...] = ()

    @property
    def is_set(self) -> bool:
        """Whether any of them changes anything."""
        return any(getattr(self, field.name) != field.default for field in fields(self))

    @property
    def is_ordered(self) -> bool:
        """Whether a position has to wait for all before it."""
        return bool(self.processors or self.custom or self.allowed)

    def add_warpers(self, warpers: LogitsProcessorList) -> None:
        """Add what decides of what tokens are drawn; behind the warpers of the other settings."""
        if self.top_h is not None:
            warpers.append(TopHLogitsWarper(self.top_h))
        if self.typical_p is not None:
            warpers.append(TypicalLogitsWarper(mass=self.typical_p))
        if self.epsilon_cutoff is not None:
            warpers.append(EpsilonLogitsWarper(epsilon=self.epsilon_cutoff))
        if self.eta_cutoff is not None:
            warpers.append(EtaLogitsWarper(epsilon=self.eta_cutoff))


def shape_logits(
    logits: torch.Tensor,
    texts: Sequence[tuple[int, torch.Tensor, int]],
    places: torch.Tensor,
    rules: TextRules,
    *,
    eos: Sequence[int],
    new: int,
) -> torch.Tensor:
    """Apply rules in the order transformers has.

    Args:
        logits: Of n positions, row after row, float32, shape (n, vocab); may be written over.
        texts: Of each row its number, the ids its text holds (before the position, where rules are
            ordered), shape (length,), and how many of the n positions are the row's.
        places: How many new tokens stand before each position, shape (n,), int; negative in a
            prompt.
        rules: What is applied.
        eos: Tokens that end a text.
        new: New tokens of a row at the most.

    Returns:
        Logits, shape (n, vocab).
    """
    if rules.token_bias:
        ids, values = zip(*rules.token_bias, strict=True)
        added = torch.tensor(values, dtype=logits.dtype, device=logits.device)
        logits[:, list(ids)] += added
    repeated: list[Processor] = []
    if rules.repetition_penalty != 1:
        repeated.append(RepetitionPenaltyLogitsProcessor(float(rules.repetition_penalty)))
    logits = _ask((*repeated, *rules.processors), texts, logits)
    _allow(logits, texts, rules)
    if rules.is_finite:
        logits = InfNanRemoveLogitsProcessor()(places[None], logits)
    _go_by_place(logits, places, rules, sent(eos, logits.device), new)
    return _ask(rules.custom, texts, logits)


def _go_by_place(
    logits: torch.Tensor, places: torch.Tensor, rules: TextRules, ends: torch.Tensor, new: int
) -> None:
    # What depends on how many new tokens stand before a position, `places` (n,), alone.
    device = logits.device
    _forbid(logits, (places >= 0) & (places < rules.min_new_tokens), ends)
    if rules.forced_last:
        last, at_last = sent(rules.forced_last, device), places == new - 1
        _leave(logits, at_last, last)
        logits[at_last[:, None] & torch.isin(_ids(logits), last)] = 0
    if rules.decay is not None:
        start, factor = rules.decay
        beyond = (places - start).clamp(min=0)[:, None].to(logits.dtype)  # (n, 1)
        said = logits[:, ends]
        more = said.abs() * (factor**beyond - 1)
        logits[:, ends] = said + more.masked_fill(~said.isfinite(), 0)
    _forbid(logits, places == 0, sent(rules.begin_suppress_tokens, device))


def _allow(
    logits: torch.Tensor, texts: Sequence[tuple[int, torch.Tensor, int]], rules: TextRules
) -> None:
    first = 0
    for row, text, count in texts if rules.allowed is not None else ():
        may = list(rules.allowed(row, text)) if count and rules.allowed is not None else [0]
        if not may:
            raise ValueError(
                f"prefix_allowed_tokens_fn allows nothing behind {len(text)} tokens of row {row}"
            )
        _leave(logits, slice(first, first + count), sent(may, logits.device))
        first += count


def _ask(
    processors: Sequence[Processor],
    texts: Sequence[tuple[int, torch.Tensor, int]],
    logits: torch.Tensor,
) -> torch.Tensor:
    # Row by row, for their texts are of different lengths: (count, length) and (count, vocab).
    if not processors:
        return logits
    parts, first = [], 0
    for _, text, count in texts:
        piece = logits[first : first + count]
        for processor in processors if count else ():
            piece = processor(text[None].expand(count, -1), piece)
        parts.append(piece)
        first += count
    return torch.cat(parts) if parts else logits


def _forbid(logits: torch.Tensor, where: torch.Tensor, tokens: torch.Tensor) -> None:
    # Of the positions `where` (n,) is true.
    if len(tokens):
        logits[where[:, None] & torch.isin(_ids(logits), tokens)] = -torch.inf


def _leave(logits: torch.Tensor, where: Any, tokens: torch.Tensor) -> None:
    # Of the positions `where`, nothing but the tokens.
    kept = torch.isin(_ids(logits), tokens)
    logits[where] = logits[where].masked_fill(~kept, -torch.inf)


def _ids(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits.shape[-1], device=logits.device)
