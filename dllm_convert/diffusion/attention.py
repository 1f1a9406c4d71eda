"""Attention masks of training and scoring, as functions of indices. They do not travel.

Every function returns a boolean tensor of shape (batch, 1, queries, keys), True where the query may
look. Block diffusion's masks are those of BD3LM (arXiv 2503.09573, section 4 and figure 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._pytree import tree_map_only

from dllm_convert.diffusion.device import moved
from dllm_convert.modeling.published.masks import see_self


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """Bidirectional inside a document; nothing sees padding or a packed neighbour.

    Args:
        segments: Document of each token, -1 at padding, shape (batch, length).

    Returns:
        Boolean mask, shape (batch, 1, length, length).
    """
    same = segments[:, :, None] == segments[:, None, :]
    return see_self(same & (segments >= 0)[:, None, :])


def causal_mask(segments: torch.Tensor) -> torch.Tensor:
    """Causal inside a document, for the base model's own likelihood.

    Args:
        segments: Document of each token, -1 at padding, shape (batch, length).

    Returns:
        Boolean mask, shape (batch, 1, length, length).
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    return document_mask(segments) & (index[:, None] >= index[None, :])


CLEAN, UNUSED = 0, -1
TILE = 128
"""Queries, and keys, of a block of flex attention."""
_NOBODY = 1 << 30
"""Codes of tokens that nobody sees begin below minus this; above it is no code."""


@dataclass(frozen=True)
class StreamMask:
    """Who sees whom in training: noisy views and, in BD3LM, one clean stream, in any order.

    A noisy query sees its own block in its own view and the clean tokens of earlier blocks; a clean
    query sees the clean tokens of its own and earlier blocks and never anything noisy. Nobody sees
    another document. All fields have one entry per token, shape (batch, width), int.

    Attributes:
        streams: `CLEAN`, a view's number from 1, or `UNUSED`.
        blocks: Number of each token's block, rising along the row.
        segments: Number of each token's document, rising along the row, -1 at padding.
        positions: Position of each token in its document, from 0.
        causal_clean: A clean query sees of its own block only what stands before it.
        causal_noisy: So does a noisy one.
        closed: Pairs of positions (query, key) that stay closed, shape (length, length), bool.
    """

    streams: torch.Tensor
    blocks: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    causal_clean: bool = False
    closed: torch.Tensor | None = None
    causal_noisy: bool = False

    @property
    def is_open(self) -> bool:
        """Whether everybody sees everybody in their row: one view of one whole document."""
        if self.closed is not None or self.causal_noisy:
            return False
        columns = (self.streams, self.blocks, self.segments)
        alike = all(bool((column == column[:, :1]).all()) for column in columns)
        return alike and bool((self.streams != CLEAN).all() & (self.segments >= 0).all())

    @cached_property
    def rule(self) -> Rule:
        """The same rule in the fewest numbers; see `Rule`."""
        views = max(int(self.streams.max()), 1)
        inside = self.segments >= 0
        segments, places = self.segments.clamp(min=0), self.positions * inside
        # Tokens numbered along the text of the row, whatever columns they stand in: the documents
        # before theirs, (batch, documents), and their position: (batch, width).
        lengths = segments.new_zeros(len(segments), int(segments.max()) + 1)
        lengths.scatter_reduce_(1, segments, (places + 1) * inside, "amax")
        before = (lengths.cumsum(1) - lengths).gather(1, segments)
        order = before + places
        # Where each token's block begins, by the same count: (batch, blocks), then (batch, width).
        begins = torch.full((len(order), int(self.blocks.max()) + 1), _NOBODY).to(order)
        start = begins.scatter_reduce_(1, self.blocks, order, "amin").gather(1, self.blocks)
        # In steps of views + 1 there is room between the clean tokens before a block and those of
        # it for the block's views: start * step < start * step + view < (start + 1) * step.
        step = views + 1
        clean = ((order if self.causal_clean else start) + 1) * step
        code = torch.where(self.streams == CLEAN, clean, -(start * step + self.streams))
        unseen = (self.streams == UNUSED) | ~inside
        alone = -_NOBODY - 1 - torch.arange(code.shape[1], device=code.device)
        low = torch.where(unseen, _NOBODY, before * step + 1)
        code, positions = torch.where(unseen, alone, code).int(), self.positions.int()
        return Rule(code, low.int(), positions, self.closed, self.causal_noisy)

    def dense(self) -> torch.Tensor:
        """Boolean mask, shape (batch, 1, width, width)."""
        return self.rule.dense()

    def block_mask(self) -> BlockMask:
        """The mask as flex attention reads it."""
        return self.rule.block_mask()

    def equals(self, other: StreamMask) -> bool:
        """Whether both are the same rule over the same tokens."""
        return self.rule.equals(other.rule)


@dataclass(frozen=True)
class Rule:
    """Who sees whom, in two integers per token: three are read for a pair.

    A query sees the keys of its own code, and keys from `low` up to the size of its code. Codes of
    clean tokens are positive and rise along the row; those of noisy ones are negative, so that no
    range holds them, and their size lies behind the clean tokens before their block and ahead of
    those of it. Tokens that nobody sees have a code of their own, and see themselves.

    Attributes:
        code: Shape (batch, width), int32.
        low: Where what a query may see begins: its document; shape (batch, width), int32.
        positions: Position of each token in its document, shape (batch, width), int32.
        closed: Pairs of positions (query, key) that stay closed, shape (length, length), bool.
        causal: Of the keys of its own code a query sees those that do not stand after it.
    """

    code: torch.Tensor
    low: torch.Tensor
    positions: torch.Tensor
    closed: torch.Tensor | None = None
    causal: bool = False

    def to(self, device: torch.device) -> Rule:
        """Return the same rule on a device, without waiting for it."""
        named = ("code", "low", "positions", "closed")
        return replace(self, **{name: moved(getattr(self, name), device) for name in named})

    def allows(self, row: Any, query: Any, key: Any) -> Any:
        """The rule, for indices that are numbers or broadcast together."""
        places = (self.positions[row, query], self.positions[row, key]) if self.causal else ()
        seen = _sees(self.code[row, query], self.low[row, query], self.code[row, key], *places)
        if self.closed is None:
            return seen
        closed = self.closed[self.positions[row, query], self.positions[row, key]]
        return (seen & ~closed) | (query == key)

    def dense(self, first: int = 0) -> torch.Tensor:
        """Boolean mask, shape (batch, 1, width - first, width): queries from the `first` on."""
        # (batch, queries, 1) against (batch, 1, width).
        stands = (self.positions[:, first:, None], self.positions[:, None, :])
        seen: torch.Tensor = _sees(
            self.code[:, first:, None],
            self.low[:, first:, None],
            self.code[:, None, :],
            *(stands if self.causal else ()),
        )
        if self.closed is not None:
            places = self.positions.long()
            closed = self.closed[places[:, first:, None], places[:, None, :]]
            itself = torch.eye(self.code.shape[1], dtype=torch.bool, device=seen.device)
            seen = (seen & ~closed) | itself[first:]
        return seen.unsqueeze(1)

    def block_mask(self, device: torch.device | None = None, first: int = 0) -> BlockMask:
        """The mask as flex attention reads it.

        Blocks are found on the CPU from runs of tokens that are alike, of which a row has a few
        hundred, and not from its millions of pairs.

        Args:
            device: Where to put it; None for where the rule is.
            first: Queries begin at this column, a multiple of `TILE`.
        """
        rows, width = self.code.shape
        there = self if device is None else self.to(device)
        if self.closed is not None:
            # Pairs that were drawn have no runs; only the first steps of a training have them.
            allows, where = there.allows, str(there.code.device)
            return create_block_mask(
                lambda b, _, q, k: allows(b, q + first, k),
                *(rows, None, width - first, width),
                device=where,
            )
        code, low, place, causal = there.code, there.low, there.positions, self.causal

        def sees(b: Any, _: Any, q: Any, k: Any) -> Any:
            places = (place[b, q + first], place[b, k]) if causal else ()
            return _sees(code[b, q + first], low[b, q + first], code[b, k], *places)

        some, every = (tiles[:, first // TILE :] for tiles in self.tiles())
        mask = BlockMask.from_kv_blocks(
            *_ordered(some & ~every),
            *_ordered(every),
            BLOCK_SIZE=TILE,
            mask_mod=sees,
            seq_lengths=(width - first, width),
        )
        if code.device.type == "cpu":
            return mask
        values = tree_map_only(
            torch.Tensor, partial(moved, device=code.device), mask.as_tuple(flatten=False)
        )
        return BlockMask(*values)

    def tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tiles have an open pair, and which have no other: (batch, tiles, tiles), bool."""
        rows, width = self.code.shape
        count = -(-width // TILE)
        some = np.zeros((rows, count, count), dtype=bool)
        every = np.zeros_like(some)
        whole = width // TILE
        codes, lows = self.code.cpu().numpy(), self.low.cpu().numpy()
        stands = self.positions.cpu().numpy()
        for row in range(rows):
            # Tokens of one code and one document see and are seen alike. A run of them ends where
            # a tile does, so that each is of one tile: (runs,).
            changes = (np.diff(codes[row]) != 0) | (np.diff(lows[row]) != 0)
            changes[TILE - 1 :: TILE] = True
            if self.causal:
                changes |= np.diff(stands[row]) != 0
            starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
            code, low = codes[row, starts], lows[row, starts]
            place = stands[row, starts]
            places = (place[:, None], place[None, :]) if self.causal else ()
            seen = _sees(code[:, None], low[:, None], code[None, :], *places)
            first = np.searchsorted(starts, np.arange(count) * TILE)
            for found, reduce in ((some, np.logical_or), (every, np.logical_and)):
                found[row] = reduce.reduceat(reduce.reduceat(seen, first, 0), first, 1)
        # What pads the last tile is no open pair.
        every[:, whole:] = every[:, :, whole:] = False
        return torch.from_numpy(some), torch.from_numpy(every)

    def equals(self, other: Rule) -> bool:
        """Whether both let the same tokens see each other."""
        if (self.closed is None) != (other.closed is None):
            return False
        named = ("code", "low", "positions", "closed")
        pairs = [(getattr(self, name), getattr(other, name)) for name in named]
        return self.causal == other.causal and all(
            mine is None or torch.equal(mine, yours) for mine, yours in pairs
        )


def open_rule(tokens: torch.Tensor) -> Rule:
    """Return the rule by which all tokens of a row, (batch, width), see each other; on the CPU."""
    same = torch.zeros(tokens.shape, dtype=torch.int32)
    return Rule(same, same, same)


def _sees(code: Any, low: Any, key: Any, place: Any = 0, of_key: Any = 0) -> Any:
    """Whether queries of a code, whose document begins at `low`, see keys of the code `key`.

    Of their own code they see keys whose place is not after theirs.
    """
    return ((code == key) & (of_key <= place)) | ((low <= key) & (key < abs(code)))


def _ordered(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count each query tile's key tiles and put them first: (batch, 1, q), (batch, 1, q, k)."""
    numbers = tiles.unsqueeze(1).int()
    order = numbers.argsort(dim=-1, descending=True, stable=True)
    return numbers.sum(-1, dtype=torch.int32), order.int()
