"""The forward that predicts corrupted tokens: which tokens run, who sees whom, what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.attention.flex_attention import BlockMask

from dllm_convert.diffusion.attention import CLEAN, UNUSED, Rule, StreamMask, open_rule
from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.diffusion.device import moved
from dllm_convert.diffusion.losses import cross_entropy, uniform_divergence
from dllm_convert.diffusion.neighbours import neighbour_divergence
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.streams import WIDTH_MULTIPLE, Streams, corrupted, needed_columns
from dllm_convert.diffusion.word_classes import WordClasses, class_divergence


@dataclass(frozen=True)
class Prediction:
    """One forward of the model, and what its logits are compared with.

    The first n logits predict corrupted tokens; the m after them, if there is an autoregressive
    loss, predict the clean stream.

    Attributes:
        inputs: Keyword arguments of the model's `forward` but for the mask; `logits_at` holds
            n + m flat indices.
        mask: Who sees whom; None if everybody sees everybody in their row.
        targets: Clean tokens at the scored positions, shape (n,).
        weight: NELBO weights at the scored positions, shape (n,).
        rows: Row of the text of each scored position, shape (n,).
        places: Its place in that row, shape (n,), where it was laid out.
        ar_targets: Next tokens of the clean stream, shape (m,).
        noisy: Corrupted tokens at the scored positions, shape (n,); where tokens are replaced only.
        kept: As in `Corruption`, shape (n, 2); where tokens are replaced only.
        read: Columns that the mask has before those of the inputs: keys that are there already.
    """

    inputs: dict[str, torch.Tensor]
    mask: StreamMask | None
    targets: torch.Tensor
    weight: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    ar_targets: torch.Tensor
    noisy: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    read: int = 0

    @property
    def device(self) -> torch.device:
        """Where its inputs are."""
        return self.inputs["input_ids"].device

    def to(self, device: torch.device) -> Prediction:
        """Return the same forward with inputs and targets on a device, without waiting for it.

        The mask stays where it was laid out, and goes along in the form that attention takes.
        """
        inputs = {name: moved(value, device) for name, value in self.inputs.items()}
        named = ("targets", "weight", "rows", "ar_targets", "noisy", "kept")
        return replace(
            self, inputs=inputs, **{name: moved(getattr(self, name), device) for name in named}
        )

    @property
    def rule(self) -> Rule:
        """Who sees whom, where it was laid out; of an open mask, too."""
        return open_rule(self.inputs["input_ids"]) if self.mask is None else self.mask.rule

    def dense_mask(self) -> torch.Tensor | None:
        """The mask as sdpa and eager attention take it; None if open.

        Its shape is (batch, 1, width, read + width).
        """
        return None if self.mask is None else self.mask.rule.to(self.device).dense(self.read)

    def block_mask(self) -> BlockMask:
        """The mask as flex attention takes it; an open one, too: without any it would build one."""
        return self.rule.block_mask(self.device, self.read)

    def nats(self, logits: torch.Tensor, objective: Objective) -> torch.Tensor:
        """Unweighted loss of each scored position, shape (n,), of logits (n + m, vocab)."""
        logits = logits[: len(self.targets)]
        if objective.classes is not None:
            return self.class_nats(logits, objective.classes, objective.mask_token_id)[0]
        if self.noisy is None or self.kept is None:
            return cross_entropy(logits, self.targets, objective.mask_token_id)
        what = logits, self.targets, self.noisy, self.kept, objective.mask_token_id
        if objective.walk is not None:
            return neighbour_divergence(*what, objective.walk)
        return uniform_divergence(*what)

    def class_nats(
        self, logits: torch.Tensor, classes: WordClasses, mask_token_id: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a schedule that is learnt, and their derivatives by exponents, (n, classes)."""
        return class_divergence(logits[: len(self.targets)], self.targets, classes, mask_token_id)

    def ar_nats(self, logits: torch.Tensor, objective: Objective) -> torch.Tensor:
        """Cross-entropy of the clean stream's next tokens, shape (m,), of logits (n + m, vocab)."""
        tail = logits[len(self.targets) :]
        return cross_entropy(tail, self.ar_targets, objective.mask_token_id)


def predict(
    batch: TextBatch,
    views: Sequence[Corruption],
    objective: Objective,
    *,
    ar_loss: bool = False,
    closed: torch.Tensor | None = None,
    multiple: int = WIDTH_MULTIPLE,
) -> Prediction:
    """Lay out the forward that predicts the corrupted tokens of `batch`.

    K views of BD3LM share one clean stream: (K + 1) * L tokens instead of 2 * K * L. Views of MDLM
    are rows of their own. Counting what runs has a GPU wait, so text and noise are best on the CPU,
    and `Prediction.to` moves the result.

    Args:
        batch: Clean text.
        views: Draws of noise over it.
        objective: mdlm or bd3lm.
        ar_loss: Also predict each clean token from the clean ones before it; bd3lm with a strictly
            causal clean stream.
        closed: Pairs of positions that stay closed, see `closed_pairs`; (length, length), bool.
        multiple: What the width of a row is a multiple of, filled up with tokens that nobody sees.

    Returns:
        Model inputs, targets and weights.
    """
    if objective.target == "mdlm":
        return _one_stream(batch, views, objective, closed, multiple)
    # In what follows L is the length of a row, K the number of views, N = (K + 1) * L.
    length, count = batch.tokens.shape[1], len(views)
    blocks = batch.blocks(objective.size)
    # 1..K number the noisy streams, 0 is the clean one, which stands last in the row: (K + 1,).
    stream = torch.arange(1, count + 2, device=blocks.device) % (count + 1)
    # [view 1 ; ... ; view K ; clean], each (batch, N). A token has the same position in all of
    # them, so rotary positions and block boundaries agree between streams.
    everything = Streams(
        torch.cat([*(corrupted(batch, view, objective) for view in views), batch.tokens], dim=1),
        batch.positions.repeat(1, count + 1),
        blocks.repeat(1, count + 1),
        batch.segments.repeat(1, count + 1),
        stream.repeat_interleave(length).expand(len(blocks), -1),
    )
    # Prompts and last blocks have no reader: without them the row is (batch, width) with width < N.
    needed = needed_columns(batch, blocks, views, all_clean=ar_loss)
    used, column = everything.compact(needed, multiple)
    reads, rows, places, numbers = [], [], [], []
    for number, view in enumerate(views):
        # n scored tokens of this view: row and place in the text, each (n,), and the column of the
        # uncompacted row at which their prediction is read.
        row, at = view.scored.nonzero(as_tuple=True)
        read = at + number * length
        if objective.token_shift:
            # A block's first position follows a token that is clean already: read that stream.
            first = batch.positions[row, at] % objective.size == 0
            read = torch.where(first, at + count * length, read) - 1
        # Flat indices into (batch * width), so that the head runs at these places only.
        reads.append(row * used.tokens.shape[1] + column[row, read])
        rows.append(row)
        places.append(at)
        numbers.append(torch.full_like(row, number))
    ar_targets = batch.tokens.new_empty(0)
    if ar_loss:
        # Token i of the clean stream, the last L columns, is predicted where i - 1 stands.
        row, at = batch.scorable.nonzero(as_tuple=True)
        reads.append(row * used.tokens.shape[1] + column[row, at + count * length - 1])
        ar_targets = batch.tokens[row, at]
    return _prediction(
        batch, views, objective, used,
        (torch.cat(numbers), torch.cat(rows), torch.cat(places)),
        torch.cat(reads), ar_targets, closed,
    )  # fmt: skip


def _one_stream(
    batch: TextBatch,
    views: Sequence[Corruption],
    objective: Objective,
    closed: torch.Tensor | None,
    multiple: int,
) -> Prediction:
    # Views are rows: (K * batch, L), view by view. There is no clean stream; who is not padding has
    # stream 1, and all of a document see each other.
    size, length = batch.tokens.shape
    streams = Streams(
        torch.cat([corrupted(batch, view, objective) for view in views]),
        batch.positions.repeat(len(views), 1),
        batch.noise_groups(objective).repeat(len(views), 1),
        batch.segments.repeat(len(views), 1),
        torch.where(batch.segments >= 0, 1, UNUSED).repeat(len(views), 1),
    )
    if multiple != WIDTH_MULTIPLE and length % multiple:
        # All columns stay where they are; what comes after them is seen by nobody.
        streams, _ = streams.compact(torch.ones_like(streams.tokens, dtype=torch.bool), multiple)
        length = streams.tokens.shape[1]
    # View, row and place of the n scored tokens, each (n,), in the order of the flattened logits.
    number, row, at = torch.stack([view.scored for view in views]).nonzero(as_tuple=True)
    # A document's first token is never scored, so at - 1 stays inside it.
    read = at - 1 if objective.token_shift else at
    return _prediction(
        batch, views, objective, streams, (number, row, at),
        (number * size + row) * length + read, batch.tokens.new_empty(0), closed,
    )  # fmt: skip


def _prediction(
    batch: TextBatch,
    views: Sequence[Corruption],
    objective: Objective,
    used: Streams,
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    reads: torch.Tensor,
    ar_targets: torch.Tensor,
    closed: torch.Tensor | None,
) -> Prediction:
    """Put inputs and targets together; `scored` are view, row and column of the scored tokens."""
    number, row, column = scored
    mask = StreamMask(
        used.streams,
        used.blocks,
        used.segments,
        used.positions,
        objective.context == "causal",
        closed,
        objective.draft == "causal",
    )
    # (views, batch, length) indexed by (view, row, place): what each scored token was turned into.
    replaced = [(view.tokens, view.kept) for view in views]
    noisy = kept = None
    if not objective.masks:
        noisy = torch.stack([tokens for tokens, _ in replaced if tokens is not None])[scored]
        kept = torch.stack([kept for _, kept in replaced if kept is not None])[scored]
    inputs = {"input_ids": used.tokens, "position_ids": used.positions, "logits_at": reads}
    if objective.is_gated:
        inputs["noisy"] = used.streams != CLEAN
    return Prediction(
        inputs,
        None if mask.is_open else mask,
        batch.tokens[row, column],
        torch.stack([view.weight for view in views])[number, row, column],
        row,
        column,
        ar_targets,
        noisy,
        kept,
    )


def closed_pairs(length: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Draw which pairs that look ahead stay closed (attention annealing).

    DiffuLLaMA (arXiv 2410.17891) opens a causal mask a growing share at a time.

    Args:
        length: Positions of a text.
        share: How many of the pairs stay closed: 1 is causal attention, 0 open.
        generator: On the CPU.

    Returns:
        Pairs (query, key), shape (length, length), bool.
    """
    drawn = torch.rand(length, length, generator=generator) < share
    return drawn.triu(1)
