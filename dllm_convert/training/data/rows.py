"""Training rows by number, of text that was tokenised before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.training.data.packing import Layout, Packing
from dllm_convert.training.data.reading import permutation
from dllm_convert.training.data.store import Store, build_row


@dataclass(frozen=True)
class PackedText:
    """Text that was tokenised and packed.

    Attributes:
        store: The documents.
        packing: The rows they make.
        layout: What rows look like.
        seed: Seed of the order in which rows are trained on.
    """

    store: Store
    packing: Packing
    layout: Layout
    seed: int

    def row(self, number: int) -> dict[str, Any]:
        """Return the `number`-th row of training, in an order that is new in every epoch."""
        epoch, place = divmod(number, self.packing.rows)
        row = int(_order(self.packing.rows, self.seed, epoch)[place])
        return build_row(self.store, self.packing, row, self.layout)


# One epoch ends inside a batch in which the next begins.
@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> Any:
    return permutation(rows, seed, epoch)


class ByNumber(Protocol):
    """A text whose rows are known by their number in the training."""

    def row(self, number: int) -> dict[str, Any]:
        """Return the `number`-th row of training."""


class NumberedRows(Dataset[dict[str, Any]]):
    """The first rows of a training, over all epochs and processes, to be read in their order.

    Row k is a function of the text, the seed and k, so that a batch is the same however many
    processes share it, and going on after an interruption is a matter of counting. An epoch's last
    incomplete batch is completed by the next epoch's first rows: nothing is left out or repeated.

    Args:
        text: The packed text.
        total: Number of rows.
    """

    def __init__(self, text: ByNumber, total: int) -> None:
        self._text = text
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return columns of shape (length,), as `build_row` gives them."""
        if not 0 <= number < self._total:
            raise IndexError(number)
        return self._text.row(number)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows into tensors of shape (batch, length)."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def text_batch(columns: Mapping[str, torch.Tensor]) -> TextBatch:
    """View collated columns as clean text.

    Args:
        columns: `input_ids`, and what else is known of the tokens, each of shape (batch, length):
            `segment_ids` and `position_ids` as `TextBatch` has them, `loss_mask`. Without segments
            every row is one document, as long as its `attention_mask` says.
    """
    tokens = columns["input_ids"]
    segments, places = columns.get("segment_ids"), columns.get("position_ids")
    if segments is None:
        seen = columns.get("attention_mask")
        inside = torch.ones_like(tokens) if seen is None else seen.long()
        segments = inside - 1
        if places is None:
            # Counted from the first token that is no padding, whichever side that stands on.
            places = (inside.cumsum(-1) - 1).clamp(min=0)
    elif places is None:
        raise ValueError("segment_ids without position_ids: a row of several documents needs both")
    return TextBatch(tokens, segments, places, columns.get("loss_mask"))
