"""Training to draft: masks behind clean tokens, as a lossless forward has them.

Behind a clean token the base predicts the next one by itself; what is drafted is what comes after
that. So a group of masks stands behind a token, the first of them where the base's prediction will
be, and with the token shift mask j predicts token j + 2 of what follows. Every token of a text may
have a group behind it: a forward learns from as many places as it has masks, where blocks have one
place each at which a draft begins. (Tokens after the next one from the same position: Blockwise
parallel decoding, arXiv 1811.03115; Medusa, 2401.10774.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dllm_convert.diffusion.attention import CLEAN
from dllm_convert.diffusion.corruption import Corruption, NoiseKey
from dllm_convert.diffusion.gated import CleanReading, two_forwards
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import Prediction
from dllm_convert.diffusion.streams import WIDTH_MULTIPLE, Streams


def draft_groups(batch: TextBatch, objective: Objective, key: NoiseKey) -> tuple[Corruption, ...]:
    """Draw which tokens have masks behind them, and how many.

    A group has one mask to `block_size - 1`, each number as likely; on average a text has as many
    masks as tokens.

    Args:
        batch: Clean text.
        objective: Of a gated model; its blocks are as long as the longest group and the token that
            the base predicts before it.
        key: Which noise.

    Returns:
        For each mask of a group which tokens it predicts. Weighted they estimate the mean
        cross-entropy of a draft's j-th token, all of them as important as each other: no bound.
    """
    most = objective.size - 1
    rows, length = batch.tokens.shape
    share = min(1.0, 2 / (most + 1))
    drawn = key.each_row(rows, lambda g: torch.rand(2, length, generator=g), 0)
    sizes = (drawn[:, 1] * most).long().clamp(max=most - 1) + 1
    behind = torch.where(drawn[:, 0] < share, sizes, 0)  # masks behind each token, (rows, length)
    segments, scorable = batch.segments.cpu(), batch.scorable.cpu()
    views = []
    for step in range(most):
        # Mask `step` behind token p predicts p + step + 2 of the same document.
        ahead = step + 2
        scored = torch.zeros_like(scorable)
        if length > ahead:
            same = (segments[:, :-ahead] == segments[:, ahead:]) & scorable[:, ahead:]
            scored[:, ahead:] = (behind[:, :-ahead] > step) & same
        weight = scored * (most / (share * (most - step)))
        views.append(Corruption(scored, weight.float(), behind=behind))
    return tuple(view.to(batch.tokens.device) for view in views)


def predict_drafts(
    batch: TextBatch,
    views: Sequence[Corruption],
    objective: Objective,
    *,
    multiple: int = WIDTH_MULTIPLE,
) -> tuple[CleanReading, Prediction]:
    """Lay out the two forwards of a step: the base over clean text, and groups of masks behind it.

    Args:
        batch: Clean text.
        views: What `draft_groups` drew.
        objective: Of a gated model.
        multiple: What the width of a row is a multiple of, filled up with tokens that nobody sees.

    Returns:
        What the base reads, shape (batch, read), of which no prediction is asked, and the masks,
        whose keys come behind those of the clean text.
    """
    (rows, length), most, device = batch.tokens.shape, len(views), batch.tokens.device
    index = torch.arange(length, device=device).expand(rows, -1)
    # A clean token is a block of its own, and a group the block that begins behind its token: it
    # sees what is clean before that, and itself.
    clean = Streams(
        batch.tokens, batch.positions, index, batch.segments, torch.full_like(index, CLEAN)
    )
    read, read_at = clean.compact(batch.segments >= 0, multiple)

    def spread(values: torch.Tensor, step: int = 0) -> torch.Tensor:
        # To the masks of a group one after the other, each `step` further: (rows, length * most).
        further = torch.arange(most, device=device) * step
        return (values[..., None] + further).flatten(1)

    # Masks that a view scores, and those before them in their group: (rows, length, most).
    wanted = torch.stack(
        [
            torch.nn.functional.pad(view.scored[:, step + 2 :], (0, min(step + 2, length)))
            for step, view in enumerate(views)
        ],
        -1,
    )
    needed = wanted.flip(-1).cummax(-1).values.flip(-1).flatten(1)
    noisy, column = Streams(
        torch.full((rows, length * most), objective.mask_token_id, device=device),
        spread(batch.positions + 1, 1),
        spread(index + 1),
        spread(batch.segments),
        torch.ones(rows, length * most, dtype=torch.long, device=device),
    ).compact(needed, multiple)
    # View, row and token of the n predictions, each (n,), and the mask that makes them.
    number, row, at = torch.stack([view.scored for view in views]).nonzero(as_tuple=True)
    place = column[row, (at - number - 2) * most + number]
    # Of the clean text no prediction is asked.
    return two_forwards(
        batch,
        views,
        (read, read_at),
        noisy,
        (row[:0], row[:0]),
        (number, row, at),
        place,
        objective,
    )
