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
            Places behind those m predict what a student learns from a teacher.
        mask: Who sees whom: causal.
        targets: Those first tokens, shape (m,).
        place: Column of `inputs` where each token of the text stands, if it is read; (batch,
            length), on the CPU.
    """

    inputs: dict[str, torch.Tensor]
    mask: StreamMask
    targets: torch.Tensor
    place: torch.Tensor

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
    whole: bool = False,
    multiple: int = WIDTH_MULTIPLE,
) -> tuple[CleanReading, Prediction]:
    """Lay out the two forwards of a step: the base over clean text, and the noisy views behind it.

    Args:
        batch: Clean text.
        views: Draws of noise over it, which share the clean text's keys and values.
        objective: Of a gated model.
        whole: Read all of the text, also what no noisy token sees.
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
    read, place = clean.compact(batch.segments >= 0 if whole else read_needed, multiple)
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
    return two_forwards(
        batch, views, (read, place), noisy, firsts, (number, row, at), columns, objective
    )


def two_forwards(
    batch: TextBatch,
    views: Sequence[Corruption],
    clean: tuple[Streams, torch.Tensor],
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
        clean: The clean text as it is read, (batch, read), and where its tokens stand there.
        noisy: What is trained, (batch, width).
        firsts: Flat places in (batch * read) whose predictions count as they are, and what they
            predict, each (m,).
        scored: View, row and place in the text of the tokens that are learnt, each (n,).
        columns: Column of `noisy` that predicts each of them, shape (n,).
        objective: Of a gated model.
    """
    number, row, at = scored
    read, place = clean
    reading = CleanReading(
        {"input_ids": read.tokens, "position_ids": read.positions, "logits_at": firsts[0]},
        StreamMask(read.streams, read.blocks, read.segments, read.positions, causal_clean=True),
        firsts[1],
        place,
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
        at,
        batch.tokens.new_empty(0),
        read=read.tokens.shape[1],
    )
    return reading, prediction


def lesson_reading(batch: TextBatch, forward: Prediction, *, multiple: int) -> CleanReading:
    """Lay out a teacher's forward over clean text: it predicts what the student predicts.

    Args:
        batch: Clean text.
        forward: The student's forward.
        multiple: What the width of a row is a multiple of, filled up with tokens that nobody sees.

    Returns:
        A causal forward, (batch, read), whose `logits_at` are the places that predict the n tokens
        of `forward`; nothing else is asked of it.
    """
    index = torch.arange(batch.tokens.shape[1]).expand(len(batch.tokens), -1)
    clean = Streams(
        batch.tokens, batch.positions, index, batch.segments, torch.full_like(index, CLEAN)
    )
    read, place = clean.compact(batch.segments >= 0, multiple)
    mask = StreamMask(read.streams, read.blocks, read.segments, read.positions, causal_clean=True)
    none = index.new_empty(0)
    inputs = {"input_ids": read.tokens, "position_ids": read.positions, "logits_at": none}
    return with_lesson(CleanReading(inputs, mask, none, place), forward)


def with_lesson(reading: CleanReading, forward: Prediction) -> CleanReading:
    """Ask a reading of all clean text for predictions of what the student predicts, too."""
    # The token before stands in the same document: a document's first is never scored.
    before = reading.place[forward.rows, forward.places - 1]
    asked = forward.rows * reading.inputs["input_ids"].shape[1] + before
    places = torch.cat([reading.inputs["logits_at"], asked])
    return replace(reading, inputs={**reading.inputs, "logits_at": places})
