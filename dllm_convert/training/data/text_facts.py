"""What training rows are made of, and whether that is text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.modeling.text_bounds import end_token

ONE_TOKEN, UNKNOWN, PADDING = 0.3, 0.1, 0.6
"""Shares of one token, of the unknown token and of padding from which text is not text."""


@dataclass(frozen=True)
class Text:
    """What rows hold.

    Attributes:
        top: Most frequent scored token, and its share of them.
        unknown: Share of the unknown token in the scored ones.
        padding: Share of padding in all positions.
    """

    top: tuple[int, float]
    unknown: float
    padding: float

    @property
    def problems(self) -> list[str]:
        """Say what is wrong with it, if anything is."""
        token, share = self.top
        found = []
        if share >= ONE_TOKEN:
            found.append(f"data: {share:.0%} of the scored tokens are token {token}")
        if self.unknown >= UNKNOWN:
            found.append(
                f"data: {self.unknown:.0%} of the scored tokens are unknown to the tokenizer; is "
                "this its language, and its text?"
            )
        if self.padding >= PADDING:
            found.append(f"data: {self.padding:.0%} of the rows is padding; lower sequence_length")
        return found


def text_statistics(batches: Sequence[TextBatch], tokenizer: Any, *, filled: bool = False) -> Text:
    """Count what text is made of.

    Args:
        batches: Clean text.
        tokenizer: Knows which token is unknown and which ends a text.
        filled: Whether rows are filled with end tokens that are scored on purpose.
    """
    unknown = tokenizer.unk_token_id
    fill = end_token(tokenizer) if filled else None
    scored = torch.cat([batch.tokens[batch.scorable].cpu() for batch in batches])
    positions = sum(batch.tokens.numel() for batch in batches)
    padding = sum(int((batch.segments < 0).sum()) for batch in batches)
    if fill is not None:
        scored = scored[scored != fill]
    if not len(scored):
        return Text((0, 0.0), 0.0, padding / positions)
    ids, counts = torch.unique(scored, return_counts=True)
    most = int(counts.argmax())
    absent = 0.0 if unknown is None else float((scored == unknown).float().mean())
    return Text((int(ids[most]), float(counts[most]) / len(scored)), absent, padding / positions)
