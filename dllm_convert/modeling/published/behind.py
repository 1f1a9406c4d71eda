"""Rows behind a base that goes on from its cache: what is in the cache, and what else is known.

Where no mask of a family can be opened a noisy token can still stand behind clean ones: in a
row of its own, on a copy of the base's cache, strictly causal. The copy is thrown away, or
rolled back as far as its tokens turned out to be known. Recurrent states do not roll back:
there the cache from before stays, and what became known since is run again at the head of the
next forward.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .canvas import Canvas
from .drafting import Tree
from .moving import sent
from .rope import final_lengths

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
    # Rows are taken out of what the cache itself holds: copied before, all would be copied twice.
    held = {id(one): one for *_, one in held_tensors(cache)}
    twin = copy.deepcopy(cache, dict(held))
    twin.reorder_cache(rows)
    for home, name, one in held_tensors(twin):
        if id(one) in held:  # it has no rows
            home[name] = one.clone()
    return twin


def held_tensors(cache: Any) -> list[tuple[dict[Any, Any], Any, torch.Tensor]]:
    """Return the tensors of a cache's layers, each behind what holds it, and its name there."""
    layers = [vars(layer) for layer in getattr(cache, "layers", ())]
    homes = layers + [one for layer in layers for one in layer.values() if isinstance(one, dict)]
    return [
        (home, name, one)
        for home in homes
        for name, one in home.items()
        if isinstance(one, torch.Tensor)
    ]


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
        filler: What stands behind a row's tokens where others have more; None for the mask.
    """

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        known: Sequence[list[int]],
        *,
        keep: int,
        head: int,
        filler: int | None = None,
    ) -> None:
        self.model, self.canvas = model, canvas
        self._filler = int(canvas.options.mask_token_id) if filler is None else filler
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
                cache = group.cache
                if cache is not None:
                    lines = [group.numbers.index(number) for number in ahead]
                    cache = branched(cache, sent(lines, self.canvas.tokens.device))
                self._cut(group, [number for number in group.numbers if number not in ahead])
                looked_at.append(_Group(ahead, cache))
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
        tokens = [
            head + text.tokens + [self._filler] * (width - length)
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
        # So may one text of each where all of them learn of it, and what does not hold is cut off.
        alone = whole and branches == 1 and self._keep == 0 and _cuts(cache)
        if cache is not None and not (bare or alone):
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


def _cuts(cache: Any) -> bool:
    """Have a cache keep what is needed to take columns back; whether they can be."""
    if cache is None or not _rolls_back(cache):
        return False
    cache.activate_past_recording()
    return _records(cache)


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
        filler: What stands behind a row's tokens where others have more; None for the mask.
    """

    def __init__(self, model: Any, canvas: Canvas, filler: int | None = None) -> None:
        self.model, self.canvas, self._filler = model, canvas, filler
        self._texts: dict[int, list[Text]] = {}
        self._tree = Tree((), 0)
        self._prefixes: Prefixes | None = None

    def read_prompt(self, rows: Sequence[Any]) -> None:
        """Run all but the last token of each prompt into the cache."""
        texts = self.canvas.tokens.tolist()
        known = [texts[row.number][: row.clean] for row in rows]
        self._prefixes = Prefixes(
            self.model, self.canvas, known, keep=0, head=_HEAD, filler=self._filler
        )

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
            group = row.group(tree, mask)
            self._texts[row.number] = [
                Text(
                    [own[node] for node in path] + group * drafts,
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
