"""MDLM and BD3LM, once: what goes into the model and what comes out as a loss.

MDLM (arXiv 2406.07524) runs one noisy stream with full attention. BD3LM (arXiv 2503.09573) runs
`[noisy ; clean]` with the two-stream mask. They differ in the mask, in which tokens share a noise
level, and in where a prediction is read; everything else is the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dllm_convert.attention import document_mask, two_stream_mask
from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.schema import Target


@dataclass(frozen=True)
class Objective:
    """What the model is trained and measured on.

    Attributes:
        target: mdlm or bd3lm.
        mask_token_id: Token that stands for a masked one.
        token_shift: Whether position i is predicted from the hidden state of i-1, as AR models do.
        block_size: Tokens per block, bd3lm only.
    """

    target: Target
    mask_token_id: int
    token_shift: bool
    block_size: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> Objective:
        """Read the objective from a converted checkpoint's config."""
        facts = config.diffusion
        return cls(
            facts["objective"], facts["mask_token_id"], facts["token_shift"], facts["block_size"]
        )


@dataclass(frozen=True)
class TextBatch:
    """Clean text, possibly several documents to a row.

    Attributes:
        tokens: Token ids, shape (batch, length).
        segments: Document of each token, numbered within its row, -1 at padding; (batch, length).
        positions: Position of each token in its document, from 0, shape (batch, length).
        loss: Tokens that may be masked and scored, shape (batch, length), bool; None for all. In a
            chat, the assistant's only.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    loss: torch.Tensor | None = None

    def to(self, device: torch.device) -> TextBatch:
        """Return the same text on a device."""
        loss = None if self.loss is None else self.loss.to(device)
        return TextBatch(
            self.tokens.to(device), self.segments.to(device), self.positions.to(device), loss
        )

    @property
    def scorable(self) -> torch.Tensor:
        """Tokens that are predicted: of `loss`, no padding, no document's first; (batch, length).

        The first token has nothing before it: autoregressive models do not score it either, so
        likelihoods of both kinds count the same tokens.
        """
        inside = (self.segments >= 0) & (self.positions > 0)
        return inside if self.loss is None else inside & self.loss

    def blocks(self, size: int) -> torch.Tensor:
        """Block of each token, counted from position 0 of its document, rising along the row."""
        padding = self.segments < 0
        starts = torch.where(
            padding,
            padding.long().diff(dim=-1, prepend=padding[:, :1]) > 0,
            self.positions % size == 0,
        )
        return starts.long().cumsum(-1)

    def noise_groups(self, objective: Objective) -> torch.Tensor:
        """Tokens that share a noise level: a block (BD3LM), a document (MDLM); (batch, length)."""
        whole = self.tokens.shape[1]
        return self.blocks(_size(objective) if objective.target == "bd3lm" else whole)


@dataclass(frozen=True)
class Prediction:
    """One forward of the model, and what its logits are compared with.

    Attributes:
        inputs: Keyword arguments of the model's `forward`; `logits_at` holds n flat indices.
        targets: Clean tokens at the masked positions, shape (n,).
        weight: NELBO weights at the masked positions, shape (n,).
        scored: Number of tokens the loss is averaged over, masked or not.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    weight: torch.Tensor
    scored: int


def _size(objective: Objective) -> int:
    if objective.block_size is None:
        raise ValueError("bd3lm needs a block size")
    return objective.block_size


def predict(batch: TextBatch, corruption: Corruption, objective: Objective) -> Prediction:
    """Lay out the forward that predicts the masked tokens of `batch`.

    Args:
        batch: Clean text.
        corruption: One draw of noise over it.
        objective: mdlm or bd3lm.

    Returns:
        Model inputs of length L (mdlm) or 2L (bd3lm), targets and weights.
    """
    tokens, length = batch.tokens, batch.tokens.shape[1]
    noisy = tokens.masked_fill(corruption.masked, objective.mask_token_id)
    rows, columns = corruption.masked.nonzero(as_tuple=True)
    if objective.target == "mdlm":
        width, inputs = length, {"input_ids": noisy, "position_ids": batch.positions}
        mask = document_mask(batch.segments)
        read = columns - 1 if objective.token_shift else columns
    else:
        blocks = batch.blocks(_size(objective))
        width = 2 * length
        inputs = {
            "input_ids": torch.cat([noisy, tokens], dim=1),
            "position_ids": batch.positions.repeat(1, 2),
        }
        mask = two_stream_mask(blocks, batch.segments)
        read = columns
        if objective.token_shift:
            # A block's first position follows a token that is clean already: read that stream.
            first = batch.positions[rows, columns] % _size(objective) == 0
            read = columns - 1 + length * first
    inputs |= {"attention_mask": mask, "logits_at": rows * width + read}
    return Prediction(
        inputs,
        tokens[rows, columns],
        corruption.weight[rows, columns],
        int(batch.scorable.sum()),
    )


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Cross-entropy in nats, shape (n,), of logits (n, vocab) that can never predict the mask."""
    never = torch.zeros_like(logits[:1])
    never[:, mask_token_id] = -torch.inf
    return F.cross_entropy((logits + never).float(), targets, reduction="none")
