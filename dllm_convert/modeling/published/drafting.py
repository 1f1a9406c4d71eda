"""What a lossless forward holds: the last known token, drafts behind it, masks for the next."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

MOST_RANK = 4
"""Candidates kept of each drafted position."""
_DEEPEST = 8
_PROBE = 12
"""Where drafts do not pay, every so many forwards has masks, to see whether they would by now."""
_DECAY = 0.97
_PRIOR = (3.0, (0.5, 0.15, 0.07, 0.04))
"""What is believed before anything was seen: so many drafts, and the share of each rank that was
right. More than a short training reaches: what does not hold is seen after a few forwards, and what
is not tried never."""
_COSTS = {
    "cpu": ((1, 1.0), (2, 1.16), (4, 1.27), (8, 1.51), (16, 1.84), (32, 2.35), (64, 4.0)),
    "gated cpu": ((1, 1.0), (2, 1.2), (6, 1.23), (8, 1.43), (12, 1.52), (16, 1.71), (32, 2.5)),
    "": ((1, 1.0), (64, 1.05), (256, 1.3), (1024, 4.0)),
}
"""Tokens of a forward, and what it takes beside one of a single token. On a CPU: measured with 135M
parameters, packed weights, 256 tokens in the cache, with an adapter of rank 32 on all but a single
token; elsewhere reading the weights is the most."""


@dataclass(frozen=True)
class Tree:
    """One forward of every row: a chain of drafts, alternatives beside it, masks behind them.

    Nodes are clean tokens: 0 is the last token that is known, 1 to `depth` the chain behind it, and
    then the alternatives. Columns of the forward are the nodes, then the masks of each group.

    Attributes:
        widths: Candidates at each depth, the chain's included; all stand behind the chain.
        masks: Masks behind a node that has a group.
        all_groups: Whether alternatives have groups too; what is behind one that has none is
            drafted a forward later.
    """

    widths: tuple[int, ...]
    masks: int
    all_groups: bool = False

    @property
    def depth(self) -> int:
        """Drafted tokens of the chain."""
        return len(self.widths)

    @cached_property
    def nodes(self) -> tuple[tuple[int, int, int], ...]:
        """Parent, depth and rank of each node; the first has no parent."""
        chain = [(depth - 1, depth, 0) for depth in range(self.depth + 1)]
        beside = [
            (depth, depth + 1, rank)
            for depth, width in enumerate(self.widths)
            for rank in range(1, width)
        ]
        return (*chain, *beside)

    @property
    def groups(self) -> int:
        """How many nodes, the first ones, have masks behind them."""
        if not self.masks:
            return 0
        return len(self.nodes) if self.all_groups else self.depth + 1

    @property
    def size(self) -> int:
        """Columns of the forward."""
        return len(self.nodes) + self.groups * self.masks

    @cached_property
    def branches(self) -> tuple[tuple[tuple[int, ...], bool], ...]:
        """The tree as rows of their own: the nodes of each, and whether it has masks behind them.

        Every node with a group ends a row, and every other one that no such row passes.
        """

        def path(node: int) -> tuple[int, ...]:
            parent = self.nodes[node][0]
            return (*(path(parent) if parent >= 0 else ()), node)

        rows = [(path(node), True) for node in range(self.groups)]
        for node in reversed(range(len(self.nodes))):
            if not any(node in nodes for nodes, _ in rows):
                rows.append((path(node), False))
        return tuple(rows)

    @property
    def branched_size(self) -> int:
        """Columns of all those rows, which are as wide as the widest."""
        widest = max(len(nodes) + self.masks * drafts for nodes, drafts in self.branches)
        return len(self.branches) * widest

    def child(self, node: int, rank: int) -> int | None:
        """The node of a rank behind another, None if there is none."""
        for number, (parent, _, own) in enumerate(self.nodes):
            if parent == node and own == rank:
                return number
        return None

    def layout(self, *, open_drafts: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Where columns stand and whom they see.

        Args:
            open_drafts: Masks of a group see each other; else each those before it.

        Returns:
            Positions counted from the first node, shape (size,), and who sees whom among the
            columns, shape (size, size), bool.
        """
        count = len(self.nodes)
        places = [depth for _, depth, _ in self.nodes]
        seen = torch.zeros(self.size, self.size, dtype=torch.bool)
        for node, (parent, _, _) in enumerate(self.nodes):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = True
        for node in range(self.groups):
            first = count + node * self.masks
            own = slice(first, first + self.masks)
            places += [places[node] + 1 + step for step in range(self.masks)]
            seen[own, :count] = seen[node, :count]
            block = torch.ones(self.masks, self.masks, dtype=torch.bool)
            seen[own, own] = block if open_drafts else block.tril()
        return torch.tensor(places), seen


LARGEST = Tree((MOST_RANK, 2, *(1,) * (_DEEPEST - 2)), _DEEPEST + 1, all_groups=True)
"""The tree with most columns that is ever asked for."""


class DraftPolicy:
    """How much to draft: what pays by the share of drafts that were right lately.

    The same for all rows of a batch. It decides how fast a text is written, never what is.

    Args:
        kind: Type of the device, and whether an adapter is computed for masks.
        rows: Rows of the batch.
        ahead: Masks that stand before the first drafted position: 1 without token shift, where
            the first mask of a group writes what the verifier says anyway.
        most: Drafts behind a token at the most: a block less the token that the verifier writes.
        branched: Whether each branch of a tree takes a row of its own.
    """

    def __init__(
        self, kind: str, rows: int, ahead: int, most: int = _DEEPEST, *, branched: bool = False
    ) -> None:
        self._costs = _COSTS.get(kind, _COSTS[""])
        self._ahead, self._most = ahead, min(max(most, 1), _DEEPEST)
        seen, shares = _PRIOR
        self._seen = [seen] * _DEEPEST
        self._hits = [[seen * share for share in shares] for _ in range(_DEEPEST)]
        self._forwards, self._branched = 0, branched
        self.rows = rows

    def observe(self, depth: int, rank: int | None) -> None:
        """Take note which candidate of a depth, from 1 on, was right behind a right chain."""
        if depth > _DEEPEST:
            return
        self._seen[depth - 1] = self._seen[depth - 1] * _DECAY + 1
        hits = self._hits[depth - 1]
        for number in range(MOST_RANK):
            hits[number] = hits[number] * _DECAY + (number == rank)

    def choose(self, available: int, left: int) -> Tree:
        """Return what the next forward holds.

        Args:
            available: Positions that are drafted.
            left: Tokens that the row with most to write still needs.
        """
        self._forwards += 1
        if left <= 1:
            # The last token that is wanted needs nothing behind it.
            return Tree((), 0)
        best = max(self._trees(left - 1), key=self._rate)
        masks = best.masks
        if not best.depth and self._forwards % _PROBE == 1:
            masks = 1 + self._ahead
        return Tree(best.widths[:available], masks, best.all_groups)

    def _trees(self, most: int) -> Iterator[Tree]:
        yield Tree((), 0)
        for depth in range(1, min(self._most, most) + 1):
            for first in range(1, MOST_RANK + 1):
                for second in (1, 2) if depth > 1 else (0,):
                    widths = (first, *((second,) if second else ()), *(1,) * (depth - 2))
                    for grouped in (False, True) if first > 1 or second > 1 else (False,):
                        yield Tree(widths, depth + self._ahead, grouped)

    def _rate(self, tree: Tree) -> float:
        """Tokens for the time of a forward of one token, were all forwards like this one."""
        tokens, chain, bare = 1.0, 1.0, 0.0
        for depth, width in enumerate(tree.widths):
            shares = [hits / self._seen[depth] for hits in self._hits[depth][:width]]
            tokens += chain * sum(shares)
            bare += 0 if tree.all_groups else chain * sum(shares[1:])
            chain *= shares[0]
        # Behind an alternative without masks comes a forward without drafts.
        size = tree.branched_size if self._branched else tree.size
        time = self._cost(size) + bare * self._cost(1 + tree.masks)
        return (tokens + bare) / time

    def _cost(self, tokens: int) -> float:
        return self._of(tokens * self.rows) / self._of(self.rows)

    def _of(self, tokens: int) -> float:
        # Along straight lines between what was measured, the last one going on.
        known = [size for size, _ in self._costs]
        at = min(max(bisect_left(known, tokens), 1), len(known) - 1)
        (before, low), (after, high) = self._costs[at - 1 : at + 1]
        return low + (high - low) * (tokens - before) / (after - before)
