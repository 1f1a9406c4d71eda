"""What a lossless forward holds: the last known token, drafts behind it, masks for the next."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

MOST_RANK = 4
"""Candidates kept of each drafted position."""
SURE = 0.5
"""A draft at least as likely stands in place of its mask where drafts are denoised further."""
_DEEPEST = 8
_LONGEST = 32
"""Drafted tokens at the most where one forward drafts and another verifies."""
_STEPS = 3
"""Forwards at the most that denoise one draft."""
_FADE = 0.9
"""How much of a depth's share the next one has, before it was tried."""
_HOPE = 0.7
"""Wrong drafts that are left by one more of those, before it was tried."""
_TRIED = 0.07
"""Share of the time of plain decoding that trying drafts may take."""
_FIRST = 1.5
"""Forwards of plain decoding that trying a model's own drafts may take besides."""
_PROBE = 12
"""Where drafts do not pay, every so many forwards has masks, to see whether they would by now."""
_DECAY = 0.97
_PRIOR = (3.0, (0.5, 0.15, 0.07, 0.04))
"""What is believed before anything was seen: so many drafts, and the share of each rank that was
right in the first place. More than a short training reaches: what does not hold is seen after a few
forwards, and what is not tried never."""
_COSTS = {
    "cpu": ((1, 1.0), (2, 1.16), (4, 1.27), (8, 1.51), (16, 1.84), (32, 2.35), (64, 4.0)),
    "gated cpu": ((1, 1.0), (2, 1.2), (6, 1.23), (8, 1.43), (12, 1.52), (16, 1.71), (32, 2.5)),
    "gated cpu avx2": ((1, 1.0), (2, 1.28), (4, 1.5), (6, 1.62), (9, 1.75), (16, 1.88), (28, 2.34)),
    "": ((1, 1.0), (64, 1.05), (256, 1.3), (1024, 4.0)),
}
"""Tokens of a forward, and what it takes beside one of a single token. On a CPU: measured with 135M
parameters, packed weights, 256 tokens in the cache, with an adapter of rank 32 on all but a single
token, which takes more where vectors are shorter; elsewhere reading the weights is the most."""


def _table(kind: str) -> tuple[tuple[int, float], ...]:
    """The costs of a kind of device, of the processor's vectors where that was measured."""
    vectors = torch.backends.cpu.get_cpu_capability().lower() if kind.endswith("cpu") else ""
    return _COSTS.get(f"{kind} {vectors}") or _COSTS.get(kind) or _COSTS[""]


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
        refines: Whether drafts of the last forward that are sure stand in place of their masks; of
            a tree without nodes behind the last known token.
    """

    widths: tuple[int, ...]
    masks: int
    all_groups: bool = False
    refines: bool = False

    @cached_property
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

    @cached_property
    def groups(self) -> int:
        """How many nodes, the first ones, have masks behind them."""
        if not self.masks:
            return 0
        return len(self.nodes) if self.all_groups else self.depth + 1

    @cached_property
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

    @cached_property
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


class _Record:
    """Which candidates were right lately, of drafts that were denoised in so many forwards."""

    def __init__(self) -> None:
        self.belief = [_PRIOR[0]] * _LONGEST
        self.seen = [0.0] * _LONGEST
        self.hits = [[0.0] * MOST_RANK for _ in range(_LONGEST)]

    def observe(self, depth: int, rank: int | None) -> None:
        """Take note of a candidate of a depth, from 1 on, behind a right chain."""
        if depth > _LONGEST:
            return
        self.belief[depth - 1] *= _DECAY
        self.seen[depth - 1] = self.seen[depth - 1] * _DECAY + 1
        hits = self.hits[depth - 1]
        for number in range(MOST_RANK):
            hits[number] = hits[number] * _DECAY + (number == rank)

    def share(self, depth: int, rank: int, believed: float) -> float:
        """Return how often a candidate is right; `believed` is what counts until it was seen."""
        weight, seen = self.belief[depth - 1], self.seen[depth - 1]
        return (self.hits[depth - 1][rank] + weight * believed) / (seen + weight)


class Costs:
    """What forwards of so many tokens of each row take, one of a single token being 1.

    Args:
        kind: Type of the device, and whether an adapter is computed for masks.
        rows: Rows of the batch.
    """

    def __init__(self, kind: str, rows: int) -> None:
        self._table = _table(kind)
        self._rows = rows
        self._known: dict[int, float] = {}

    def of(self, tokens: int) -> float:
        """Return what a forward takes."""
        found = self._known.get(tokens)
        if found is None:
            found = self._measured(tokens * self._rows) / self._measured(self._rows)
            self._known[tokens] = found
        return found

    def _measured(self, tokens: int) -> float:
        # Along straight lines between what was measured, the last one going on.
        known = [size for size, _ in self._table]
        at = min(max(bisect_left(known, tokens), 1), len(known) - 1)
        (before, low), (after, high) = self._table[at - 1 : at + 1]
        return low + (high - low) * (tokens - before) / (after - before)


class DraftPolicy:
    """How much to draft, and in which schedule: what pays by the share of right drafts lately.

    A fused forward verifies what the last one drafted and drafts anew behind all that may hold. Or
    one forward drafts, others denoise the draft further, and one verifies: those hold fewer tokens
    and are more; each of them writes the verifier's next token as well. Where a forward costs by
    its tokens long drafts that are right pay only there; where it costs by itself, only if
    denoising makes them better. Where drafts took more time than they saved, they are tried in a
    share of the time only: text of some length takes at most a tenth more than plain decoding.

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
        self._costs = Costs(kind, rows)
        self._ahead, self._most = ahead, min(max(most, 1), _LONGEST)
        self._records = [_Record() for _ in range(_STEPS)]
        self._forwards, self._branched = 0, branched
        self._drafted_in = 1  # forwards that the drafts at hand were denoised in
        self._coming: list[Tree] = []  # what a schedule of several forwards has left
        self._over, self._tokens = 0.0, 0.0
        """Time beside that of plain decoding, which may be less than none; tokens of a row."""

    def observe(self, depth: int, rank: int | None) -> None:
        """Take note which candidate of a depth, from 1 on, was right behind a right chain."""
        self._records[self._drafted_in - 1].observe(depth, rank)

    def choose(self, available: int, left: int) -> Tree:
        """Return what the next forward holds.

        Args:
            available: Positions that are drafted.
            left: Tokens that the row with most to write still needs.
        """
        self._forwards += 1
        tree = self._chosen(available, left)
        return replace(tree, widths=tree.widths[: min(available, left - 1)])

    def drafted(self, tree: Tree, written: float) -> None:
        """Say that a forward is done, its drafts are those at hand, and what a row wrote."""
        self._drafted_in = self._drafted_in + 1 if tree.refines else 1
        self._over += self._cost(self._size(tree)) - written
        self._tokens += written

    def _chosen(self, available: int, left: int) -> Tree:
        coming, self._coming = self._coming, []
        if left <= 1:
            # The last token that is wanted needs nothing behind it.
            return Tree((), 0)
        if coming and available:
            self._coming = coming[1:]
            return coming[0]
        shares = _shares(self._records)
        rate, best = self._fused(left - 1, shares[0])
        apart, steps, count = self._apart(left - 1, shares)
        if self._over > _FIRST + _TRIED * self._tokens:
            # Whatever is believed of drafts: so far they took more time than they saved.
            best, apart = Tree((), 0), 0.0
        if apart > rate:
            verify = Tree((1,) * count, 0)
            if available:
                # What a fused forward has drafted is worth one that verifies it.
                return verify
            draft = Tree((), count + self._ahead)
            self._coming = [replace(draft, refines=True)] * (steps - 1) + [verify]
            return draft
        masks = best.masks
        if not best.depth and self._forwards % _PROBE == 1:
            masks = 1 + self._ahead
        return replace(best, masks=masks)

    def _apart(self, most: int, shares: list[list[float]]) -> tuple[float, int, int]:
        """The best way to draft and to verify apart, of drafts of up to `most` tokens.

        Returns:
            Tokens for the time of a forward of one token; forwards that draft; drafted tokens.
        """
        best = (0.0, 1, 1)
        for steps, own in enumerate(shares, start=1):
            tokens, chain = steps + 1.0, 1.0
            for count in range(1, min(self._most, most) + 1):
                chain *= own[count - 1]
                tokens += chain
                drafting = steps * self._cost(1 + count + self._ahead)
                best = max(best, (tokens / (drafting + self._cost(1 + count)), steps, count))
                if chain < _PRIOR[1][-1]:
                    break
        return best

    def _fused(self, most: int, shares: list[float]) -> tuple[float, Tree]:
        """The best tree that verifies and drafts at once, and its tokens for such a time."""
        best = (0.0, Tree((), 0))
        for tree in _trees(min(self._most, _DEEPEST, most), self._ahead):
            rate = self._rate(tree, shares)
            if rate > best[0]:
                best = rate, tree
        return best

    def _rate(self, tree: Tree, shares: list[float]) -> float:
        """Tokens for the time of a forward of one token, were all forwards like this one."""
        tokens, chain, bare, record = 1.0, 1.0, 0.0, self._records[0]
        for depth, width in enumerate(tree.widths, start=1):
            others = sum(record.share(depth, rank, _PRIOR[1][rank]) for rank in range(1, width))
            tokens += chain * (shares[depth - 1] + others)
            bare += 0 if tree.all_groups else chain * others
            chain *= shares[depth - 1]
        # Behind an alternative without masks comes a forward without drafts.
        time = self._cost(self._size(tree)) + bare * self._cost(1 + tree.masks)
        return (tokens + bare) / time

    def _size(self, tree: Tree) -> int:
        """Columns of a row's forward over a tree, or of the rows that it is cut into."""
        return tree.branched_size if self._branched else tree.size

    def _cost(self, tokens: int) -> float:
        return self._costs.of(tokens)


class PairPolicy:
    """How much another model drafts, by what was right lately, and whether at all.

    A cycle is forwards of the drafter over a block, and one of the verifier over the draft. What
    is tried without a reason takes at most a share of the time that plain decoding would take.

    Args:
        kind: Type of the device.
        rows: Rows of the batch.
        block: Tokens of a block, all of which each forward of the drafter holds.
        size: Parameters of the drafter, the verifier's being 1.
        steps: Forwards of a draft at the most.
    """

    def __init__(
        self, kind: str, rows: int, block: int, size: float, steps: int | None = None
    ) -> None:
        self._costs = Costs(kind, rows)
        self._size, self._drafting = size, size * self._costs.of(block)
        self._records = [_Record() for _ in range(min(steps or _STEPS, _STEPS))]
        self._planned, self._drafted_in = 0.0, 1
        self._over, self._tokens = 0.0, 0.0
        """Time beside that of plain decoding, which may be less than none; tokens of a row."""

    def plan(self, left: int, room: int, behind: int, prompt: int = 0) -> tuple[int, int]:
        """Return in how many forwards to draft how many tokens; of none, 0.

        Args:
            left: Tokens that the row with most to write still needs.
            room: Tokens up to the end of its block.
            behind: Blocks that the drafter has to read before, one by one.
            prompt: Tokens that it has to read before, in one forward.
        """
        self._planned = 0.0
        most, reading = min(left - 1, room, _LONGEST), behind * self._drafting
        if prompt:
            reading += self._size * self._costs.of(prompt)
        if most < 1:
            return 1, 0
        best = (0.0, 1, 1)
        for steps, shares in enumerate(_shares(self._records), start=1):
            tokens, chain = 1.0, 1.0
            for count in range(1, most + 1):
                chain *= shares[count - 1]
                tokens += chain
                time = steps * self._drafting + self._costs.of(1 + count)
                best = max(best, (tokens / time, steps, count))
        rate, steps, count = best
        if rate <= 1:
            steps, count = 1, min(most, _DEEPEST)
            trial = self._drafting + self._costs.of(1 + count) - 1
            if self._over + reading + trial > trial + _TRIED * self._tokens:
                return 1, 0
        self._planned, self._drafted_in = reading + steps * self._drafting, steps
        return steps, count

    def observe(self, depth: int, rank: int | None) -> None:
        """Take note whether a draft of a depth, from 1 on, was right behind a right chain."""
        self._records[self._drafted_in - 1].observe(depth, rank)

    def choose(self, available: int, left: int) -> Tree:
        """Return what the verifier's next forward holds: the drafts, of which that many are."""
        return Tree((1,) * min(available, left - 1), 0)

    def drafted(self, tree: Tree, written: float) -> None:
        """Say that a forward is done, and how many tokens a row wrote on the average."""
        self._over += self._planned + self._costs.of(tree.size) - written
        self._tokens += written


def _shares(records: Sequence[_Record]) -> list[list[float]]:
    """How often the first candidate of each depth is right behind a right chain.

    Returns:
        Of drafts of one forward, of two, ...: a share for each depth.
    """
    found: list[list[float]] = []
    for record in records:
        shares: list[float] = []
        for depth in range(1, _LONGEST + 1):
            believed = _PRIOR[1][0]
            if found:
                believed = 1 - _HOPE * (1 - found[-1][depth - 1])
            elif shares:
                # What was not tried is nearly as good as what stands before it.
                believed = _FADE * shares[-1]
            shares.append(record.share(depth, 0, believed))
        found.append(shares)
    return found


@cache
def _trees(deepest: int, ahead: int) -> tuple[Tree, ...]:
    """All trees of chains up to so deep whose masks may be drafted from, the bare one first."""
    found = [Tree((), 0)]
    for depth in range(1, deepest + 1):
        for first in range(1, MOST_RANK + 1):
            for second in (1, 2) if depth > 1 else (0,):
                widths = (first, *((second,) if second else ()), *(1,) * (depth - 2))
                for grouped in (False, True) if first > 1 or second > 1 else (False,):
                    found.append(Tree(widths, depth + ahead, grouped))
    return tuple(found)
