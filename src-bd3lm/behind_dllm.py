"""Noisy tokens behind a copy of the base's cache, by dllm-convert 0.1.0.

Of a model whose config says `behind: cache`: no attention of its base is opened. And what a
lossless forward holds, of any model.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .decoding_dllm import Canvas, final_lengths
from .gated_dllm import sent

# Rows behind a base that goes on from its cache: what is in the cache, and what else is known.
#
# Where no mask of a family can be opened a noisy token can still stand behind clean ones: in a
# row of its own, on a copy of the base's cache, strictly causal. The copy is thrown away, or
# rolled back as far as its tokens turned out to be known. Recurrent states do not roll back:
# there the cache from before stays, and what became known since is run again at the head of the
# next forward.


_HEAD = 16
"""Known tokens that are run again in front of drafts at the most, before they go into the cache."""
_SPREAD = 32
"""Known tokens that a row of a batch may be ahead of another one that shares its forwards."""


def stands_behind_cache(config: Any) -> bool:
    """Whether noisy tokens stand behind a copy of the base's cache, as a config says."""
    section = getattr(config, "diffusion", None) or {}
    return bool(section.get("behind") == "cache")


def check_last(noisy: torch.Tensor) -> None:
    """Refuse noisy tokens (batch, length) that have clean ones behind them.

    Raises:
        ValueError: There are such: nothing would keep the clean ones from seeing them.
    """
    if bool((noisy[:, :-1] & ~noisy[:, 1:]).any()):
        raise ValueError(
            "noisy tokens have to be the last ones of their row: this family's attention stays as "
            "it is, and a clean token behind them would see them"
        )


def branched(cache: Any, rows: torch.Tensor) -> Any:
    """Return a copy of a cache of transformers whose row i is row `rows[i]`, (n,), of it."""
    twin = copy.deepcopy(cache)
    twin.reorder_cache(rows)
    return twin


@dataclass(frozen=True)
class Text:
    """What a row may go on with.

    Attributes:
        tokens: Behind all that is known of the row.
        clean: How many of them are clean; those behind are noisy.
        wanted: Places whose logits are asked for; -1 is the last known token.
        certain: Whether all of it holds, whatever the logits say.
    """

    tokens: list[int]
    clean: int
    wanted: Sequence[int]
    certain: bool = False


@dataclass
class _Group:
    """Rows that share forwards.

    Attributes:
        numbers: Their numbers in the batch.
        cache: The base's, a row for each; None before anything was read.
        twin: What the last forward made of it or of a copy, with `branches` rows for each.
        width: Columns that forward had.
        held: Of rows that learned from it: the branch, and how many of those columns are known.
    """

    numbers: list[int]
    cache: Any = None
    twin: Any = None
    branches: int = 1
    width: int = 0
    held: dict[int, tuple[int, int]] = field(default_factory=dict)


class Prefixes:
    """What is known of every row: in the base's cache, or run again in front of what is asked.

    Args:
        model: A gated model whose noisy tokens stand behind a cache.
        canvas: The batch; counts forwards.
        known: Known tokens of each row of it.
        keep: Last known tokens that stay out of the cache, because their logits are asked for.
        head: Others that are run again at the most.
    """

    def __init__(
        self, model: Any, canvas: Canvas, known: Sequence[list[int]], *, keep: int, head: int
    ) -> None:
        self.model, self.canvas = model, canvas
        self._keep, self._head = keep, head
        self._waiting = {number: list(tokens) for number, tokens in enumerate(known)}
        self._groups = [_Group(list(self._waiting))] if known else []
        self._regroup()
        for group in self._groups:
            self._absorb(group)

    def read(self, texts: Mapping[int, Sequence[Text]]) -> dict[int, list[torch.Tensor]]:
        """Run what rows may go on with, each text as if the others were not there.

        Args:
            texts: Of the rows that are run, by number; as many of each.

        Returns:
            Of each row and text its logits, (wanted, vocab).
        """
        self._regroup()
        found: dict[int, list[torch.Tensor]] = {}
        for group in self._groups:
            numbers = [number for number in group.numbers if number in texts]
            group.twin, group.held = None, {}
            if numbers:
                if self._absorbable(group) >= max(self._head, 1):
                    self._absorb(group)
                found |= self._run(group, numbers, texts)
        return found

    def learn(self, number: int, text: Text, branch: int, count: int) -> None:
        """Say that the first `count` tokens of one of the texts that a row was read with hold."""
        for group in self._groups:
            if number in group.numbers:
                group.held[number] = branch, len(self._waiting[number]) + count
        self._waiting[number] = self._waiting[number] + text.tokens[:count]

    def settle(self) -> None:
        """Take over of the last forward what all rows of a group learned, where that can be."""
        for group in self._groups:
            twin, held = group.twin, group.held
            group.twin, group.held = None, {}
            if twin is None or len(held) < len(group.numbers):
                continue
            recorded = _rolls_back(twin) and _records(twin)
            # The last known tokens whose logits are asked for are not among them.
            common = min(length for _, length in held.values()) - self._keep
            surplus = group.width - common
            if common <= 0 or (surplus and not recorded):
                continue
            if group.branches > 1:
                lines = [
                    line * group.branches + held[number][0]
                    for line, number in enumerate(group.numbers)
                ]
                twin.reorder_cache(sent(lines, self.canvas.tokens.device))
            if recorded:
                twin.crop(-surplus)  # of 0 columns: what only a roll-back would need is dropped
            group.cache = twin
            for number in group.numbers:
                del self._waiting[number][:common]

    def select(self, numbers: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        for group in self._groups:
            self._cut(group, [number for number in group.numbers if number in numbers])
        self._groups = [group for group in self._groups if group.numbers]

    def _cut(self, group: _Group, numbers: list[int]) -> None:
        if numbers == group.numbers:
            return
        lines = [group.numbers.index(number) for number in numbers]
        if group.cache is not None and lines:
            group.cache.reorder_cache(sent(lines, self.canvas.tokens.device))
        group.numbers = numbers

    def _regroup(self) -> None:
        """Part rows that are far ahead from those that share their forwards."""
        looked_at, self._groups = self._groups, []
        while looked_at:
            group = looked_at.pop()
            least = min(len(self._waiting[number]) for number in group.numbers)
            ahead = [n for n in group.numbers if len(self._waiting[n]) > least + _SPREAD]
            if ahead:
                other = _Group(list(group.numbers), copy.deepcopy(group.cache))
                self._cut(group, [number for number in group.numbers if number not in ahead])
                self._cut(other, ahead)
                looked_at.append(other)
            self._groups.append(group)

    def _absorbable(self, group: _Group) -> int:
        return min(len(self._waiting[number]) for number in group.numbers) - self._keep

    def _absorb(self, group: _Group) -> None:
        """Run into the cache what all rows of a group have waiting."""
        count = self._absorbable(group)
        if count <= 0:
            return
        heads = [self._waiting[number][:count] for number in group.numbers]
        group.cache, _ = self._forward(group.numbers, group.cache, heads, None, [])
        if _rolls_back(group.cache) and _records(group.cache):
            group.cache.crop(0)
        for number in group.numbers:
            del self._waiting[number][:count]

    def _run(
        self, group: _Group, numbers: list[int], texts: Mapping[int, Sequence[Text]]
    ) -> dict[int, list[torch.Tensor]]:
        branches = max(len(texts[number]) for number in numbers)
        rows = [
            (number, line, text, self._waiting[number])
            for line, number in enumerate(group.numbers)
            if number in texts
            for text in texts[number]
        ]
        lengths = [len(head) + len(text.tokens) for *_, text, head in rows]
        width = max(lengths)
        # Behind a row's own tokens stands what nobody sees; noisy, since what is noisy is last.
        filler = int(self.canvas.options.mask_token_id)
        tokens = [
            head + text.tokens + [filler] * (width - length)
            for (*_, text, head), length in zip(rows, lengths, strict=True)
        ]
        first = [len(head) + text.clean for *_, text, head in rows]
        at = [
            place * width + len(head) + offset
            for place, (*_, text, head) in enumerate(rows)
            for offset in text.wanted
        ]
        device = self.canvas.tokens.device
        noisy = None
        if min(first) < width:
            noisy = torch.arange(width, device=device) >= sent(first, device)[:, None]
        lines = [line for _, line, *_ in rows]
        cache, whole = group.cache, lines == list(range(len(group.numbers)))
        # Nothing but known tokens, and all of each row: they may stay in the cache.
        bare = noisy is None and whole and all(text.certain for *_, text, _ in rows)
        if cache is not None and not bare:
            cache = branched(cache, sent(lines, device))
        cache, logits = self._forward([row[0] for row in rows], cache, tokens, noisy, at)
        group.twin, group.branches, group.width = cache, branches, width
        parts = iter(torch.split(logits, [len(text.wanted) for *_, text, _ in rows]))
        found: dict[int, list[torch.Tensor]] = {number: [] for number in numbers}
        for number, *_ in rows:
            found[number].append(next(parts))
        return found

    def _forward(
        self,
        numbers: Sequence[int],
        cache: Any,
        tokens: Sequence[list[int]],
        noisy: torch.Tensor | None,
        at: list[int],
    ) -> tuple[Any, torch.Tensor]:
        device, limits = self.canvas.tokens.device, self.canvas.limits
        if cache is not None and _rolls_back(cache):
            cache.activate_past_recording()
        with final_lengths(self.model, lambda: limits[sent(list(numbers), device)]):
            output = self.model(
                sent(list(tokens), device),
                past_key_values=cache,
                use_cache=True,
                logits_at=sent(at, device),
                **({} if noisy is None else {"noisy": noisy}),
            )
        self.canvas.forwards += 1
        return output.past_key_values, output.logits


def _rolls_back(cache: Any) -> bool:
    """Whether columns of a cache can be taken back exactly: it has no recurrent state."""
    return bool(getattr(cache, "is_croppable", False))


def _records(cache: Any) -> bool:
    """Whether all layers of a cache that forget were told to keep what a roll-back needs."""
    return all(getattr(layer, "record_past", True) for layer in cache.layers)


class CacheBlockReader:
    """Forward passes of block after block as `BlockReader` runs them, on copies of a cache."""

    def __init__(self, model: Any, canvas: Canvas, size: int) -> None:
        self.canvas, self.size = canvas, size
        first = canvas.masked.long().argmax(-1)
        self.starts = first // size * size
        known = [
            row[:start]
            for row, start in zip(canvas.tokens.tolist(), self.starts.tolist(), strict=True)
        ]
        self._prefixes = Prefixes(model, canvas, known, keep=1, head=1)

    def columns(self) -> torch.Tensor:
        """Columns of the block each active row is at, shape (rows, block)."""
        return self.starts[:, None] + torch.arange(self.size, device=self.starts.device)

    def read_prompt(self) -> None:
        """Nothing: what is known is read already."""

    def read_ahead(self, columns: torch.Tensor) -> torch.Tensor | None:
        """None: a written block is read by the forward that denoises the next one."""
        return None

    def read(
        self, columns: torch.Tensor, masked: torch.Tensor, clean: torch.Tensor
    ) -> torch.Tensor:
        """Return logits of the masked positions; rows whose block is clean go on to the next one.

        Arguments are those of `BlockReader.read`.
        """
        numbers = self.canvas.rows.tolist()
        shown = self.canvas.tokens[self.canvas.rows[:, None], columns].tolist()
        places = [row.nonzero().squeeze(-1).tolist() for row in masked]
        texts = {
            # Shifted, a place predicts the next one; the last known token predicts the first.
            number: [Text(row, 0, [place - 1 for place in wanted])]
            for number, row, wanted in zip(numbers, shown, places, strict=True)
            if wanted
        }
        found = self._prefixes.read(texts) if texts else {}
        for number, row, written in zip(numbers, shown, clean.tolist(), strict=True):
            if written:
                self._prefixes.learn(number, Text(row, len(row), []), 0, len(row))
        self.starts = self.starts + clean.long() * self.size
        parts = [found[number][0] for number in numbers if number in found]
        return torch.cat(parts) if parts else torch.zeros(0, 1, device=columns.device)

    def select(self, kept: torch.Tensor) -> None:
        """Keep only these rows; the canvas has them already."""
        self.starts = self.starts[kept]
        self._prefixes.select(self.canvas.rows.tolist())


class CacheTreeReader:
    """Forward passes over a tree of drafts, each branch in a row of its own on a copy of a cache.

    Args:
        model: A gated model whose noisy tokens stand behind a cache.
        canvas: The batch.
    """

    def __init__(self, model: Any, canvas: Canvas) -> None:
        self.model, self.canvas = model, canvas
        self._texts: dict[int, list[Text]] = {}
        self._tree = Tree((), 0)
        self._prefixes: Prefixes | None = None

    def read_prompt(self, rows: Sequence[Any]) -> None:
        """Run all but the last token of each prompt into the cache."""
        texts = self.canvas.tokens.tolist()
        known = [texts[row.number][: row.clean] for row in rows]
        self._prefixes = Prefixes(self.model, self.canvas, known, keep=0, head=_HEAD)

    def read(
        self, rows: Sequence[Any], tree: Tree, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a tree of every row, whose nodes are `tokens` (rows, nodes).

        Returns:
            Logits of the nodes, shape (rows, nodes, vocab), and of the drafted positions behind
            them, shape (rows, groups, drafted, vocab).
        """
        self._tree, mask = tree, int(self.canvas.options.mask_token_id)
        self._texts = {}
        for row, own in zip(rows, tokens.tolist(), strict=True):
            # Of each branch: its nodes, and the masks behind them.
            self._texts[row.number] = [
                Text(
                    [own[node] for node in path] + [mask] * (tree.masks * drafts),
                    len(path),
                    range(len(path) + tree.masks * drafts),
                    certain=len(path) == 1 and not drafts,
                )
                for path, drafts in tree.branches
            ]
        found = self._reading.read(self._texts)
        verdicts, behind = [], []
        for row in rows:
            logits = found[row.number]
            where = {
                node: (branch, place)
                for branch, (path, _) in enumerate(tree.branches)
                for place, node in enumerate(path)
            }
            verdicts.append(
                torch.stack([logits[where[n][0]][where[n][1]] for n in range(len(tree.nodes))])
            )
            behind += [
                part[len(path) :]
                for part, (path, drafts) in zip(logits, tree.branches, strict=True)
                if drafts
            ]
        verdict = torch.stack(verdicts)  # (rows, nodes, vocab)
        if not behind:
            return verdict, verdict[:, :0]
        drafted = torch.stack(behind)  # (rows * groups, drafted, vocab)
        return verdict, drafted.view(len(rows), -1, *drafted.shape[1:])

    def keep(self, rows: Sequence[Any], paths: Sequence[list[int]]) -> None:
        """Let the nodes on each row's path be known tokens, behind those it has."""
        for row, path in zip(rows, paths, strict=True):
            branch = next(
                number
                for number, (nodes, _) in enumerate(self._tree.branches)
                if list(nodes[: len(path)]) == path
            )
            text = self._texts[row.number][branch]
            self._reading.learn(row.number, text, branch, len(path))
            row.clean += len(path)
        self._reading.settle()

    def select(self, rows: Sequence[Any], kept: Sequence[int]) -> None:
        """Keep only `rows`."""
        self._reading.select([row.number for row in rows])

    @property
    def _reading(self) -> Prefixes:
        if self._prefixes is None:
            raise RuntimeError("a tree before the prompt")
        return self._prefixes


# What a lossless forward holds: the last known token, drafts behind it, masks for the next.


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
    "gated cpu": ((1, 1.0), (2, 1.46), (6, 1.51), (8, 1.68), (12, 1.82), (16, 1.98), (32, 2.77)),
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
