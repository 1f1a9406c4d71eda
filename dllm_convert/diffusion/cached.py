"""Noisy rows behind the cache of a base that stays, for families whose masks nobody lays out.

Clean text is read from left to right by the base itself, without a gradient. Where noisy tokens
stand behind it, its cache is copied into a row of its own for each of their blocks, and only those
rows are trained; rows that stand behind as many clean tokens run together. Documents are rows of
their own, too: nothing but a cache keeps them apart. What is predicted is what
`diffusion.gated` predicts under a mask with causal drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.diffusion.device import device_of, moved
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.streams import corrupted
from dllm_convert.modeling.published.behind import branched


@dataclass(frozen=True)
class NoisyRows:
    """Rows that stand behind the same number of clean tokens.

    Attributes:
        clean: That number.
        documents: Which document each stands in, shape (rows,).
        tokens: Shape (rows, width); behind a row's last prediction stands what nobody sees.
        at: Flat places in (rows * width) that predict, shape (k,).
    """

    clean: int
    documents: torch.Tensor
    tokens: torch.Tensor
    at: torch.Tensor


@dataclass(frozen=True)
class CachedPrediction:
    """What is read, what is trained behind it, and what that is compared with.

    Attributes:
        documents: Clean text, shape (documents, longest); behind a document's end anything.
        groups: Noisy rows, by the number of clean tokens before them.
        targets: Tokens that all places of all groups predict, one after the other, shape (n,).
        weight: NELBO weights, shape (n,).
        rows: Row of the text of each, shape (n,).
        columns: Column of the text of each, shape (n,).
        views: View of each, shape (n,).
        firsts: Document and place of the tokens that the base predicts by itself, shape (m, 2).
        first_targets: Those tokens, shape (m,).
        first_places: Row and column of the text of each, shape (m, 2).
    """

    documents: torch.Tensor
    groups: tuple[NoisyRows, ...]
    targets: torch.Tensor
    weight: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    views: torch.Tensor
    firsts: torch.Tensor
    first_targets: torch.Tensor
    first_places: torch.Tensor

    def to(self, device: torch.device) -> CachedPrediction:
        """Return the same on a device; which document and place is what stays on the host."""
        named = ("documents", "targets", "weight", "first_targets")
        groups = tuple(
            replace(
                group,
                documents=moved(group.documents, device),
                tokens=moved(group.tokens, device),
                at=moved(group.at, device),
            )
            for group in self.groups
        )
        values = {name: moved(getattr(self, name), device) for name in named}
        return replace(self, groups=groups, **values)


@dataclass(frozen=True)
class _Row:
    """One noisy row: clean tokens before it, its document, its tokens, what its places predict."""

    clean: int
    document: int
    tokens: torch.Tensor
    predicts: list[tuple[int, int, int]]
    """Place in the row, view, and column of the text."""


@dataclass(frozen=True)
class _Document:
    row: int
    first: int
    length: int


def predict_behind_cache(
    batch: TextBatch, views: Sequence[Corruption], objective: Objective
) -> CachedPrediction:
    """Lay out the rows of a step: blocks behind clean text, or groups of masks where those are.

    Args:
        batch: Clean text, on the CPU.
        views: Draws of noise over it, or what `draft_groups` drew.
        objective: Of a gated model with causal drafts.
    """
    documents = _documents(batch)
    drafts = any(view.behind is not None for view in views)
    first = batch.positions % objective.size == 0
    if drafts:
        rows = list(_draft_rows(documents, views, objective))
    else:
        learnt = [replace(view, scored=view.scored & ~first) for view in views]
        rows = list(_block_rows(batch, documents, views, learnt, objective))
    rows.sort(key=lambda row: row.clean)
    width = max((document.length for document in documents), default=1)
    tokens = batch.tokens.new_zeros(max(len(documents), 1), width)
    for number, document in enumerate(documents):
        span = slice(document.first, document.first + document.length)
        tokens[number, : document.length] = batch.tokens[document.row, span]
    groups = tuple(_groups(rows, objective.mask_token_id))
    where = [
        (view, documents[row.document].row, column)
        for row in rows
        for _, view, column in row.predicts
    ]
    view_of, row_of, column_of = torch.tensor(where, dtype=torch.long).view(-1, 3).unbind(1)
    weights = torch.stack([view.weight for view in views])
    given = (batch.scorable & first) if not drafts else torch.zeros_like(first)
    begins = [
        (index, column - document.first, document.row, column)
        for index, document in enumerate(documents)
        for column in (given[document.row].nonzero().squeeze(-1)).tolist()
        if document.first <= column < document.first + document.length
    ]
    firsts = torch.tensor(begins, dtype=torch.long).view(-1, 4)
    begun = firsts[:, 2:]
    return CachedPrediction(
        tokens,
        groups,
        batch.tokens[row_of, column_of],
        weights[view_of, row_of, column_of],
        row_of,
        column_of,
        view_of,
        firsts[:, :2],
        batch.tokens[begun[:, 0], begun[:, 1]],
        begun,
    )


def _documents(batch: TextBatch) -> list[_Document]:
    found = []
    for row, segments in enumerate(batch.segments):
        for segment in segments[segments >= 0].unique_consecutive().tolist():
            columns = (segments == segment).nonzero().squeeze(-1)
            found.append(_Document(row, int(columns[0]), len(columns)))
    return found


def _block_rows(
    batch: TextBatch,
    documents: Sequence[_Document],
    views: Sequence[Corruption],
    learnt: Sequence[Corruption],
    objective: Objective,
) -> Iterator[_Row]:
    size = objective.size
    for number, (view, learns) in enumerate(zip(views, learnt, strict=True)):
        noisy = corrupted(batch, view, objective)
        for index, document in enumerate(documents):
            for start in range(0, document.length, size):
                begin = document.first + start
                end = document.first + min(start + size, document.length)
                places = learns.scored[document.row, begin:end].nonzero().squeeze(-1).tolist()
                if places:
                    # A place is predicted by the one before it; nothing behind the last is seen.
                    shown = noisy[document.row, begin : begin + places[-1]]
                    predicts = [(place - 1, number, begin + place) for place in places]
                    yield _Row(start, index, shown, predicts)


def _draft_rows(
    documents: Sequence[_Document], views: Sequence[Corruption], objective: Objective
) -> Iterator[_Row]:
    # Mask j behind a token predicts the token j + 2 further on.
    for index, document in enumerate(documents):
        for place in range(document.length):
            column = document.first + place
            predicts = [
                (step, step, column + step + 2)
                for step, view in enumerate(views)
                if place + step + 2 < document.length
                and bool(view.scored[document.row, column + step + 2])
            ]
            if predicts:
                masks = torch.full((predicts[-1][0] + 1,), objective.mask_token_id)
                yield _Row(place + 1, index, masks, predicts)


def _groups(rows: Sequence[_Row], filler: int) -> Iterator[NoisyRows]:
    for clean in dict.fromkeys(row.clean for row in rows):
        group = [row for row in rows if row.clean == clean]
        tokens = torch.nn.utils.rnn.pad_sequence(
            [row.tokens for row in group], batch_first=True, padding_value=filler
        )
        # Some families compute a single token otherwise, in place and without a gradient.
        tokens = torch.nn.functional.pad(tokens, (0, max(2 - tokens.shape[1], 0)), value=filler)
        width = tokens.shape[1]
        at = [n * width + place for n, row in enumerate(group) for place, *_ in row.predicts]
        documents = torch.tensor([row.document for row in group])
        yield NoisyRows(clean, documents, tokens, torch.tensor(at))


class CleanReader:
    """The base over clean documents, from left to right; what its cache is at each place.

    Args:
        model: A gated model, as it is trained; possibly one of several processes'.
        documents: Clean text, shape (documents, longest), on the device.
    """

    def __init__(self, model: Any, documents: torch.Tensor) -> None:
        self.model, self.documents = model, documents
        self.read = 0
        self._cache: Any = None

    @torch.no_grad()
    def go_to(self, place: int, at: torch.Tensor | None = None) -> torch.Tensor:
        """Read up to `place`, which has to be further on; return logits (k, vocab) there.

        Args:
            place: Tokens that are read then.
            at: Document and place of tokens among those, shape (k, 2); None for none.
        """
        width, training = place - self.read, self.model.training
        flat = torch.zeros(0, dtype=torch.long)
        if at is not None:
            flat = at[:, 0] * width + at[:, 1] - self.read
        if training:
            self.model.eval()
        try:
            output = self.model(
                self.documents[:, self.read : place],
                past_key_values=self._cache,
                use_cache=True,
                logits_at=moved(flat, self.documents.device),
            )
        finally:
            if training:
                self.model.train()
        self.read, self._cache = place, output.past_key_values
        logits: torch.Tensor = output.logits
        return logits

    @property
    def states(self) -> list[torch.Tensor]:
        """All tensors of the cache, of whatever shape."""
        held = [value for layer in self._cache.layers for value in vars(layer).values()]
        held += [one for value in held if isinstance(value, dict) for one in value.values()]
        return [value for value in held if isinstance(value, torch.Tensor)]

    def behind(self, documents: torch.Tensor) -> dict[str, Any]:
        """Return what the model is given of a row behind each of some documents, (rows,)."""
        if self._cache is None:
            return {"use_cache": False}
        cache = branched(self._cache, documents)
        for layer in cache.layers:
            if hasattr(layer, "update_recurrent_state"):  # older releases have no such layers
                _let_assign(layer)
        return {"past_key_values": cache, "use_cache": True}


def _let_assign(layer: Any) -> None:
    """Have a layer keep a new state instead of copying it into the old one.

    The old one is what the new one was computed from: written over it is lost to the backward pass.
    """

    def update(states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        layer.is_recurrent_states_initialized[state_idx] = True
        layer.recurrent_states[state_idx] = states
        return states

    layer.update_recurrent_state = update


def read_in_turn(
    model: Any, laid_out: CachedPrediction, objective: Objective
) -> Iterator[tuple[NoisyRows | None, dict[str, Any], torch.Tensor]]:
    """Read clean text and stop wherever noisy rows begin.

    Args:
        model: A gated model.
        laid_out: What is read and what stands behind it, on the device.
        objective: What is learnt.

    Yields:
        The rows, with what else the model is given of them; and the base's cross-entropies of those
        `firsts` that were read since, in nats, in the order of their places, (k,). In the end, None
        and the last of them.
    """
    reader = CleanReader(model, laid_out.documents)
    left = by_place(laid_out)
    last = int(laid_out.firsts[:, 1].max()) if len(left) else 0
    for stop in [*laid_out.groups, None]:
        place = last if stop is None else stop.clean
        nats = laid_out.weight.new_zeros(0)
        if place > reader.read:
            # A first token is predicted by the one before it.
            until = int((laid_out.firsts[left, 1] <= place).sum())
            now, left = left[:until], left[until:]
            before = laid_out.firsts[now] - torch.tensor([0, 1])
            logits = reader.go_to(place, before)
            targets = laid_out.first_targets[moved(now, laid_out.first_targets.device)]
            nats = cross_entropy(logits, targets, objective.mask_token_id)
        yield stop, {} if stop is None else reader.behind(stop.documents), nats


def by_place(laid_out: CachedPrediction) -> torch.Tensor:
    """Return the order in which first tokens are read: indices of `firsts`, (m,)."""
    return laid_out.firsts[:, 1].argsort(stable=True)


def noisy_logits(model: Any, rows: NoisyRows, beside: dict[str, Any]) -> torch.Tensor:
    """Run noisy rows behind what was read; logits, or what stands in for them, (k, vocab)."""
    noisy = torch.ones_like(rows.tokens, dtype=torch.bool)
    logits: torch.Tensor = model(rows.tokens, noisy=noisy, logits_at=rows.at, **beside).logits
    return logits


@torch.no_grad()
def cached_nats(
    model: Any, laid_out: CachedPrediction, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropies, in nats, of all predictions, (n,), and of first tokens, (m,)."""
    laid_out = laid_out.to(device_of(model))
    found, begins, seen = [], [], 0
    for rows, beside, nats in read_in_turn(model, laid_out, objective):
        begins.append(nats)
        if rows is not None:
            targets = laid_out.targets[seen : seen + len(rows.at)]
            logits = noisy_logits(model, rows, beside)
            found.append(cross_entropy(logits, targets, objective.mask_token_id))
            seen += len(rows.at)
    firsts = torch.cat(begins)
    placed = torch.empty_like(firsts)
    placed[moved(by_place(laid_out), firsts.device)] = firsts
    return torch.cat(found) if found else firsts[:0], placed


@torch.no_grad()
def clean_logits(model: Any, batch: TextBatch) -> torch.Tensor:
    """Run every document of a text by itself, and read where a scorable token is predicted.

    Args:
        model: A decoder, stock or gated, called as a conversion is.
        batch: Text, on the CPU.

    Returns:
        Logits in the order of `batch.scorable.nonzero()`, shape (scorable tokens, vocab).
    """
    documents = _documents(batch)
    width = max((document.length for document in documents), default=1)
    tokens = batch.tokens.new_zeros(max(len(documents), 1), width)
    flat = torch.zeros_like(batch.tokens)
    for number, document in enumerate(documents):
        span = slice(document.first, document.first + document.length)
        tokens[number, : document.length] = batch.tokens[document.row, span]
        flat[document.row, span] = number * width + torch.arange(document.length)
    device = device_of(model)
    at = flat[batch.scorable] - 1
    logits: torch.Tensor = model(
        input_ids=moved(tokens, device), logits_at=moved(at, device), use_cache=False
    ).logits
    return logits
