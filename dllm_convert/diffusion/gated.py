"""Training beside a base that stays: clean text is read once, and only noisy tokens are trained.

A noisy query of block b sees the clean keys of earlier blocks and its own noisy block (BD3LM, arXiv
2503.09573). Where clean tokens are the base itself, those keys come from a forward without a
gradient, and with the token shift the first position of a block is read there: it is the base's own
prediction of the next token, and the bound counts its likelihood as it is. Per block that is
NLL(first) + NELBO(rest), and with blocks of one token it is the base's likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.attention.flex_attention import BlockMask

from dllm_convert.diffusion.attention import CLEAN, Rule, StreamMask
from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.diffusion.device import moved
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import Prediction
from dllm_convert.diffusion.streams import WIDTH_MULTIPLE, Streams, corrupted, needed_columns


@dataclass(frozen=True)
class CleanReading:
    """The forward of the base over clean text.

    Attributes:
        inputs: Keyword arguments of the model's `forward` but for the mask; `logits_at` are the
            places that predict the first token of a block, (m,).
        mask: Who sees whom: causal.
        targets: Those first tokens, shape (m,).
    """

    inputs: dict[str, torch.Tensor]
    mask: StreamMask
    targets: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where its inputs are."""
        return self.inputs["input_ids"].device

    @property
    def rule(self) -> Rule:
        """Who sees whom, where it was laid out."""
        return self.mask.rule

    def dense_mask(self) -> torch.Tensor:
        """The mask as sdpa and eager attention take it, (batch, 1, read, read)."""
        return self.rule.to(self.device).dense()

    def block_mask(self) -> BlockMask:
        """The mask as flex attention takes it."""
        return self.rule.block_mask(self.device)

    def to(self, device: torch.device) -> CleanReading:
        """Return the same forward on a device; its mask stays where it was laid out."""
        inputs = {name: moved(value, device) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, targets=moved(self.targets, device))


def predict_beside_base(
    batch: TextBatch,
    views: Sequence[Corruption],
    objective: Objective,
    *,
    multiple: int = WIDTH_MULTIPLE,
) -> tuple[CleanReading, Prediction]:
    """Lay out the two forwards of a step: the base over clean text, and the noisy views behind it.

    Args:
        batch: Clean text.
        views: Draws of noise over it, which share the clean text's keys and values.
        objective: Of a gated model.
        multiple: What the width of a row is a multiple of, filled up with tokens that nobody sees.

    Returns:
        What the base reads, shape (batch, read), and what is trained, (batch, views * length) at
        most, whose mask has the clean tokens' keys first.
    """
    length, count = batch.tokens.shape[1], len(views)
    blocks = batch.blocks(objective.size)
    first = batch.positions % objective.size == 0
    # The base predicts a block's first token whatever is masked; views predict the others.
    learnt = [replace(view, scored=view.scored & ~first) for view in views]
    given = batch.scorable & first
    noisy_needed = needed_columns(batch, blocks, learnt, all_clean=True)[:, : count * length]
    # Read is what stands before a block that has anything to predict: (batch, length).
    everything = Corruption(batch.scorable, batch.scorable.float())
    read_needed = needed_columns(batch, blocks, [everything], all_clean=False)[:, length:]

    clean = Streams(
        batch.tokens, batch.positions, blocks, batch.segments, torch.full_like(blocks, CLEAN)
    )
    read, place = clean.compact(read_needed, multiple)
    # Numbered from 1 on, view by view: (batch, views * length).
    numbers = torch.arange(1, count + 1, device=blocks.device).repeat_interleave(length)
    noisy, column = Streams(
        torch.cat([corrupted(batch, view, objective) for view in views], dim=1),
        batch.positions.repeat(1, count),
        blocks.repeat(1, count),
        batch.segments.repeat(1, count),
        numbers.expand(len(blocks), -1),
    ).compact(noisy_needed, multiple)

    row, at = given.nonzero(as_tuple=True)
    # Flat, in (batch * read): a first token follows the last one of the block before.
    firsts = row * read.tokens.shape[1] + place[row, at - 1], batch.tokens[row, at]
    # View, row and place in the text of the n tokens that are learnt, each (n,).
    number, row, at = torch.stack([view.scored for view in learnt]).nonzero(as_tuple=True)
    columns = column[row, number * length + at - 1]
    return two_forwards(batch, views, read, noisy, firsts, (number, row, at), columns, objective)


def two_forwards(
    batch: TextBatch,
    views: Sequence[Corruption],
    read: Streams,
    noisy: Streams,
    firsts: tuple[torch.Tensor, torch.Tensor],
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    columns: torch.Tensor,
    objective: Objective,
) -> tuple[CleanReading, Prediction]:
    """Put together what the base reads and, behind its keys and values, what is trained.

    Args:
        batch: Clean text.
        views: Draws of noise over it, which weigh their predictions.
        read: The clean text as it is read, (batch, read).
        noisy: What is trained, (batch, width).
        firsts: Flat places in (batch * read) whose predictions count as they are, and what they
            predict, each (m,).
        scored: View, row and place in the text of the tokens that are learnt, each (n,).
        columns: Column of `noisy` that predicts each of them, shape (n,).
        objective: Of a gated model.
    """
    number, row, at = scored
    reading = CleanReading(
        {"input_ids": read.tokens, "position_ids": read.positions, "logits_at": firsts[0]},
        StreamMask(read.streams, read.blocks, read.segments, read.positions, causal_clean=True),
        firsts[1],
    )
    both = {name: torch.cat([getattr(read, name), getattr(noisy, name)], 1) for name in vars(read)}
    mask = StreamMask(
        both["streams"],
        both["blocks"],
        both["segments"],
        both["positions"],
        causal_clean=True,
        causal_noisy=objective.draft == "causal",
    )
    prediction = Prediction(
        {
            "input_ids": noisy.tokens,
            "position_ids": noisy.positions,
            "logits_at": row * noisy.tokens.shape[1] + columns,
            "noisy": torch.ones_like(noisy.tokens, dtype=torch.bool),
        },
        mask,
        batch.tokens[row, at],
        torch.stack([view.weight for view in views])[number, row, at],
        row,
        batch.tokens.new_empty(0),
        read=read.tokens.shape[1],
    )
    return reading, prediction
