"""Noisy rows behind the cache of a base that stays, for families whose masks nobody lays out.

Clean text is read from left to right by the base itself, without a gradient. Where noisy tokens
stand behind it, its cache is copied into a row of its own for each of their blocks, and only those
rows are trained; rows that stand behind as many clean tokens run together. Documents are rows of
their own, too: nothing but a cache keeps them apart. What is predicted is what
`diffusion.gated` predicts under a mask with causal drafts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.diffusion.device import device_of, moved
from dllm_convert.diffusion.distillation import Lesson
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.streams import corrupted
from dllm_convert.modeling.published.behind import branched, held_tensors


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
        before: Document and place of the clean token before each, shape (n, 2): what the base says
            there a student learns from.
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
    before: torch.Tensor
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
        (view, row.document, documents[row.document].row, column, documents[row.document].first)
        for row in rows
        for _, view, column in row.predicts
    ]
    found = torch.tensor(where, dtype=torch.long).view(-1, 5)
    view_of, document_of, row_of, column_of, first_of = found.unbind(1)
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
        torch.stack([document_of, column_of - first_of - 1], 1),
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


class Asks(Protocol):
    """Who has a base predict what a student learns from (`training/teacher.py`)."""

    aligns: bool

    def ask(
        self, run: Callable[[], Any], places: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, Lesson]:
        """Run a forward; its logits at the first places, and the lesson of the others."""


class CleanReader:
    """The base over clean documents, from left to right; what its cache is at each place.

    Args:
        model: A gated model, as it is trained; possibly one of several processes'.
        documents: Clean text, shape (documents, longest), on the device.
        teacher: Has it predict what the adapter learns, too; None for no such lesson.
    """

    def __init__(self, model: Any, documents: torch.Tensor, teacher: Asks | None = None) -> None:
        self.model, self.documents, self.teacher = model, documents, teacher
        self.read = 0
        self._cache: Any = None

    @torch.no_grad()
    def go_to(
        self, place: int, at: torch.Tensor | None = None, taught: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Lesson | None]:
        """Read up to `place`, which has to be further on.

        Args:
            place: Tokens that are read then.
            at: Document and place of tokens among those, shape (k, 2); None for none.
            taught: The same of those whose predictions are learnt from, (j, 2).

        Returns:
            Logits of the k, (k, vocab), and where somebody teaches, the lesson of the j.
        """
        width, training = place - self.read, self.model.training
        none = torch.zeros(0, 2, dtype=torch.long)
        wanted = torch.cat([none if part is None else part for part in (at, taught)])
        flat = moved(wanted[:, 0] * width + wanted[:, 1] - self.read, self.documents.device)
        aligns = self.teacher is not None and self.teacher.aligns

        outputs: list[Any] = []

        def run() -> Any:
            output = self.model(
                self.documents[:, self.read : place],
                past_key_values=self._cache,
                use_cache=True,
                logits_at=flat,
                **({"output_hidden_states": True} if aligns else {}),
            )
            outputs.append(output)
            return output

        first = 0 if at is None else len(at)
        if training:
            self.model.eval()
        try:
            logits, lesson = (
                (run().logits, None) if self.teacher is None else self.teacher.ask(run, flat, first)
            )
        finally:
            if training:
                self.model.train()
        self.read, self._cache = place, outputs[0].past_key_values
        return logits, lesson

    @property
    def states(self) -> list[torch.Tensor]:
        """All tensors of the cache, of whatever shape."""
        return [one for *_, one in held_tensors(self._cache)]

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


class _Lessons:
    """What the base says before each prediction, from where it is read to where it is learnt.

    Several predictions, of several views or groups, stand behind one token: it is asked for once.

    Args:
        before: Document and place of those tokens, shape (n, 2), on the CPU.
    """

    def __init__(self, before: torch.Tensor) -> None:
        documents = int(before[:, 0].max()) + 1 if len(before) else 1
        # In the order in which they are read: by place, then by document.
        numbers = before[:, 1] * documents + before[:, 0]
        order, self._which = torch.unique(numbers, return_inverse=True)
        self._places = torch.stack([order % documents, order // documents], 1)  # (asked, 2)
        # The first of them that is still wanted by any later prediction, (n,).
        self._wanted_from = self._which.flip(0).cummin(0).values.flip(0)
        self._asked, self._dropped = 0, 0
        self._held: Lesson | None = None

    @property
    def end(self) -> int:
        """Tokens that have to be read before all is known."""
        return int(self._places[-1, 1]) + 1 if len(self._places) else 0

    def until(self, place: int) -> torch.Tensor:
        """Return document and place of what is asked for before a place, (j, 2)."""
        first, self._asked = self._asked, int((self._places[:, 1] < place).sum())
        return self._places[first : self._asked]

    def take(self, lesson: Lesson | None) -> None:
        """Keep what was said of the places that `until` returned last."""
        if lesson is not None:
            self._held = lesson if self._held is None else Lesson.joined([self._held, lesson])

    def has(self, span: slice) -> bool:
        """Whether all is known before some predictions."""
        return not len(self._which) or int(self._which[span].max()) < self._asked

    def of(self, span: slice) -> Lesson | None:
        """Return the lesson of some predictions, and let go what no later one wants."""
        held, which = self._held, self._which
        if held is None:
            return None
        lesson = held.at(moved(which[span] - self._dropped, held.states.device))
        after = int(self._wanted_from[span.stop]) if span.stop < len(which) else self._asked
        if after > self._dropped:
            left = torch.arange(after - self._dropped, len(held), device=held.states.device)
            self._held, self._dropped = held.at(left), after
        return lesson


@dataclass(frozen=True)
class Turn:
    """Noisy rows whose turn it is, and what the base said since the last.

    Attributes:
        rows: The rows; None in the end.
        span: Which of all predictions are theirs.
        beside: What else the model is given of them.
        firsts: The base's cross-entropies of those `firsts` that were read since, in nats, in the
            order of their places, (k,).
        lesson: Where the base teaches, what it says before each of their predictions.
    """

    rows: NoisyRows | None
    span: slice
    beside: dict[str, Any]
    firsts: torch.Tensor
    lesson: Lesson | None = None


def read_in_turn(
    model: Any, laid_out: CachedPrediction, objective: Objective, teacher: Asks | None = None
) -> Iterator[Turn]:
    """Read clean text and stop wherever noisy rows begin.

    What a teacher says of a row's predictions is read behind the row's beginning, so that its turn
    comes when that is read; until then its copy of the cache waits.

    Args:
        model: A gated model.
        laid_out: What is read and what stands behind it, on the device.
        objective: What is learnt.
        teacher: Has the base predict what the adapter learns, too; None for no such lesson.

    Yields:
        All rows in their order, then a turn without any.
    """
    reader = CleanReader(model, laid_out.documents, teacher)
    lessons = _Lessons(laid_out.before if teacher is not None else laid_out.before[:0])
    left, waiting, seen = by_place(laid_out), deque[Turn](), 0
    last = max(int(laid_out.firsts[:, 1].max()) if len(left) else 0, lessons.end)
    none = laid_out.weight.new_zeros(0)
    nats = [none]
    for stop in [*laid_out.groups, None]:
        place = last if stop is None else stop.clean
        if place > reader.read:
            # A first token is predicted by the one before it.
            until = int((laid_out.firsts[left, 1] <= place).sum())
            now, left = left[:until], left[until:]
            before = laid_out.firsts[now] - torch.tensor([0, 1])
            logits, lesson = reader.go_to(place, before, lessons.until(place))
            lessons.take(lesson)
            targets = laid_out.first_targets[moved(now, laid_out.first_targets.device)]
            nats.append(cross_entropy(logits, targets, objective.mask_token_id))
        if stop is not None:
            span = slice(seen, seen + len(stop.at))
            seen = span.stop
            waiting.append(Turn(stop, span, reader.behind(stop.documents), none))
        while waiting and lessons.has(waiting[0].span):
            turn = waiting.popleft()
            yield replace(turn, firsts=torch.cat(nats), lesson=lessons.of(turn.span))
            nats = [none]
    yield Turn(None, slice(seen, seen), {}, torch.cat(nats))


def by_place(laid_out: CachedPrediction) -> torch.Tensor:
    """Return the order in which first tokens are read: indices of `firsts`, (m,)."""
    return laid_out.firsts[:, 1].argsort(stable=True)


def noisy_inputs(rows: NoisyRows, beside: dict[str, Any]) -> dict[str, Any]:
    """Return what the model is given of noisy rows behind what was read; logits (k, vocab)."""
    noisy = torch.ones_like(rows.tokens, dtype=torch.bool)
    return {"input_ids": rows.tokens, "noisy": noisy, "logits_at": rows.at, **beside}


def noisy_logits(model: Any, rows: NoisyRows, beside: dict[str, Any]) -> torch.Tensor:
    """Run noisy rows behind what was read; logits (k, vocab)."""
    logits: torch.Tensor = model(**noisy_inputs(rows, beside)).logits
    return logits


@torch.no_grad()
def cached_nats(
    model: Any, laid_out: CachedPrediction, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropies, in nats, of all predictions, (n,), and of first tokens, (m,)."""
    laid_out = laid_out.to(device_of(model))
    found, begins = [], []
    for turn in read_in_turn(model, laid_out, objective):
        begins.append(turn.firsts)
        if turn.rows is not None:
            logits = noisy_logits(model, turn.rows, turn.beside)
            targets = laid_out.targets[turn.span]
            found.append(cross_entropy(logits, targets, objective.mask_token_id))
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
