"""Decoding on a GPU: steps are queued one behind the other, and the host rarely asks for a result.

The same tokens as `decode_blocks` and `decode_canvas` write, otherwise laid out. There the host
looks after every step which masks are left, and runs no row and no logit too much: on a CPU that
costs nothing, and saves most. Here a look costs more than what it saves. So every row and every
column of a block takes part in every step, what is written is kept by `torch.where`, and rows go
from block to block in step.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from typing import Any

import torch

from .canvas import Canvas
from .choosing import ScoreRoom, choose_among, doubted_most, make_warpers, rate_all
from .draws import Draws
from .graphs import Graphs
from .moving import Late, sent
from .options import Decoded
from .regions import Region, commits_one, counts_ahead, is_foreseeable, plan_regions, plan_steps
from .rope import final_lengths

_RECENT = 4
"""Regions whose number of steps tells what the next takes,"""
_SHARE = 0.75
"""and after which share of them the host looks whether it is written."""
_LOOK = 8
"""Steps of one region after which the host looks whether all rows have ended,"""
_NEVER = 1 << 30
"""and where there is nothing to see."""
_COLUMNS, _FLAT, _BEHIND, _UNWRITTEN, _ENDS = range(5)
"""What is known of the columns at hand before anything runs, see `_lay_tables`."""


class Pace:
    """Foresees when a region may be written, where that depends on what the model says.

    To look after every step would have the device stand still as often; a step for nothing costs
    more than several looks. So the host looks first when the shortest of the last regions was about
    to be written, and again when this one may be, if steps go on committing as much as they did.

    Args:
        recent: Steps that the last regions took; goes on from region to region.
        masks: What is to be written in this one.
    """

    def __init__(self, recent: deque[int], masks: int) -> None:
        self.recent, self.remaining, self.most = recent, masks, 1.0
        self.steps, self.looked = 0, 0
        self.next = max(1, int(_SHARE * min(recent, default=1)))

    def is_written(self, closed: torch.Tensor) -> bool:
        """Whether nothing is left of what is `closed` (rows, n) after one more step, if known."""
        self.steps += 1
        if self.steps < self.next:
            return False
        before, self.remaining = self.remaining, int((~closed).sum())
        self.most = max(self.most, (before - self.remaining) / (self.steps - self.looked))
        self.looked = self.steps
        self.next = self.steps + max(1, int(_SHARE * self.remaining / self.most))
        if not self.remaining:
            self.recent.append(self.steps)
        return not self.remaining


class QueuedDecoder:
    """The rows of a batch that are still written, and what runs on them.

    A region's tokens, and what is `closed` in it, (rows, n), are in buffers that stay where they
    are, so that a recorded step finds them.
    """

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        lengths: list[int],
        limits: list[int],
        graphs: Graphs,
        *,
        with_order: bool,
    ) -> None:
        self.model, self.canvas, self.options, self.graphs = model, canvas, canvas.options, graphs
        self.device, self.limits = canvas.tokens.device, limits
        self.with_order = with_order or self.options.remasking is not None
        self.columns_at_hand, self.regions = plan_regions(
            canvas.masked.cpu(), lengths, limits, self.options
        )
        self.steps = [plan_steps(region.counts, self.options) for region in self.regions]
        numbers = [row for steps in self.steps for row in steps]
        self.numbers = sent(numbers, self.device)  # (steps, rows): quotas, or steps left
        self.taken = list(accumulate(map(len, self.steps), initial=0))  # before each region
        self.keeps = list(range(len(lengths)))
        rows = int(model.config.vocab_size)
        forbidden = [self.options.mask_token_id, *self.options.suppress_tokens]
        # The mask of a gated model may have no logit.
        self.forbidden = sent([token for token in forbidden if token < rows], self.device)
        # The same as what is added to logits, (vocab,), so that one kernel copies and forbids.
        self.penalty = torch.zeros(rows, device=self.device)
        self.penalty.index_fill_(0, self.forbidden, -torch.inf)
        self.warpers = make_warpers(self.options)
        self.draws = Draws(self.options, self.device)
        self.places = torch.arange(self.columns_at_hand, device=self.device)
        self.forward_number = torch.zeros((), dtype=torch.long, device=self.device)
        self.may_end = bool(self.options.eos_token_ids)
        self.looked: Late | None = None  # which rows are done, on its way to the host
        self.recent: deque[int] = deque(maxlen=_RECENT)
        # Whose text has ended in a region that is written, (rows,).
        self.ended = torch.zeros(len(lengths), dtype=torch.bool, device=self.device)
        self._make_buffers()
        self._lay_tables()

    def _lay_tables(self) -> None:
        """Compute for all regions at once what does not depend on what is written.

        `known` (regions, 4 + ends, rows, n): of the columns at hand their numbers, their places in
        the flat canvas, the numbers of the region's before; the mask where a column that is not
        written holds it, and each token that ends a text where it would end one, and elsewhere no
        token. `shut` (regions, rows, n): what is closed when a region is entered. `is_last`
        (regions, rows): that a row has nothing to write in any further region.
        """
        canvas, regions, none = self.canvas, self.regions, -1
        tables = [(one.starts, one.begins, one.ends, one.counts) for one in regions]
        starts, begins, ends, masks = sent(tables, self.device)[..., None].unbind(1)
        last = [
            max((number for number, one in enumerate(regions) if one.counts[row]), default=-1)
            for row in range(self.rows)
        ]
        is_last = [[number >= one for one in last] for number in range(len(regions))]
        self.is_last = sent(is_last, self.device, torch.bool)
        columns = starts + self.places  # (regions, rows, n)
        flat = canvas.rows[:, None] * canvas.tokens.shape[1] + columns
        behind = columns.roll(1, 0)
        mask_id = self.options.mask_token_id
        unwritten = torch.where(columns < canvas.ends[canvas.rows, None], mask_id, none)
        is_new = columns >= canvas.lengths[canvas.rows, None]
        closing = [torch.where(is_new, token, none) for token in self.options.eos_token_ids]
        self.known = torch.stack([columns, flat, behind, unwritten, *closing], 1)
        # A row that has no such region stays where it was, and has written that.
        inside = (columns >= begins) & (columns < ends) & (masks > 0)
        self.shut = ~(canvas.masked.take(flat) & inside)

    def _make_buffers(self) -> None:
        rows, n = len(self.keeps), self.columns_at_hand
        new = self.canvas.tokens.new_zeros
        self.block, self.order = new(rows, n), new(rows, n)
        self.known_here = new(4 + len(self.options.eos_token_ids), rows, n)
        self.columns, self.flat, self.behind, self.unwritten = self.known_here[:_ENDS]
        self.ends_at = self.known_here[_ENDS:]
        self.closed = torch.ones(rows, n, dtype=torch.bool, device=self.device)
        self.score_room = ScoreRoom(rows, self.places)
        self.sure = torch.zeros(rows, n, device=self.device)
        self.number = new(rows)  # of this step: the quota, or how many steps are left
        # Logits of the region, float32, (rows, n, vocab), with guidance (2 * rows, n, vocab); made
        # when the model says how many tokens it knows.
        self.logits: torch.Tensor | None = None
        self.race: torch.Tensor | None = None
        self.ranked: torch.Tensor | None = None
        self.doubt: torch.Tensor | None = None
        self.noise: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that take part."""
        return len(self.keeps)

    def doubled(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows and, with guidance, the same rows once more for the text without its prompt."""
        return torch.cat([rows, rows]) if self.options.guided else rows

    def enter(self, number: int) -> None:
        """Take the columns of a region at hand."""
        canvas = self.canvas
        self.known_here.copy_(self.known[number])
        self.closed.copy_(self.shut[number])
        torch.take(canvas.tokens, self.flat, out=self.block)
        if self.with_order:
            torch.take(canvas.order, self.flat, out=self.order)

    def put_back(self) -> None:
        """Write what is at hand into the canvas."""
        canvas = self.canvas
        canvas.tokens.view(-1)[self.flat] = self.block
        # The mask is never written: where it stands, something is still to be.
        canvas.masked.view(-1)[self.flat] = self.block == self.unwritten
        if self.with_order:
            canvas.order.view(-1)[self.flat] = self.order

    def draw(self, region: int, step: int) -> None:
        """Draw all that a step needs, outside of what is recorded."""
        options, n = self.options, self.columns_at_hand
        here, place = self.regions[region], (region, step)
        parts = [
            slice(here.begins[row] - here.starts[row], here.ends[row] - here.starts[row])
            for row in range(self.rows)
        ]
        if options.temperature:
            if self.race is None:
                shape = self.rows, n, int(self.model.config.vocab_size)
                self.race = torch.ones(shape, device=self.device)
            self.draws.fill(self.race, _exponential, "token", place, self.keeps, parts)
        for name, kind, wanted in (
            ("ranked", "order", options.unmasking == "random"),
            ("doubt", "remask", options.remasking == "random"),
        ):
            if wanted:
                if getattr(self, name) is None:
                    setattr(self, name, torch.zeros(self.rows, n, device=self.device))
                self.draws.fill(getattr(self, name), _uniform, kind, place, self.keeps, parts)
        if options.noise_tokens:
            if not options.block_size:
                # The model sees all of the text, whatever of it is at hand.
                n = self.canvas.tokens.shape[1]
                parts = [slice(0, self.limits[row]) for row in range(self.rows)]
            if self.noise is None:
                self.noise = self.block.new_zeros(self.rows, n)
            self.draws.fill(self.noise, self._any_token, "noise", place, self.keeps, parts)

    def _any_token(self, buffer: torch.Tensor, generator: torch.Generator | None) -> None:
        # Any token but the mask, each as likely: ids from the mask's on are one further up.
        buffer.random_(0, self.options.noise_tokens - 1, generator=generator)
        buffer.add_((buffer >= self.options.mask_token_id).long())

    def shown(
        self, tokens: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the model sees of tokens (rows, n), with guidance without the prompts as well."""
        options, canvas = self.options, self.canvas
        if options.guided:
            given = columns < canvas.lengths[canvas.rows, None]
            return torch.cat([tokens, tokens.masked_fill(given, options.mask_token_id)])
        if self.noise is None or masked is None:
            return tokens
        return torch.where(masked, self.noise, tokens)

    @property
    def is_open(self) -> torch.Tensor | None:
        """Where noise is shown of the columns at hand, (rows, n); None where none is."""
        if not self.options.noise_tokens:
            return None
        return self.block == self.options.mask_token_id

    def keep(self, logits: torch.Tensor, first: int = 0) -> None:
        """Take logits (rows, up to n, vocab) as those of the columns at hand from `first` on."""
        if self.logits is None:
            shape = logits.shape[0], self.columns_at_hand, logits.shape[-1]
            self.logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        here = self.logits[:, first : first + logits.shape[1]]
        if self.options.guided:
            here.copy_(logits)
        else:
            torch.add(logits, self.penalty, out=here)

    def denoise(self) -> None:
        """Commit what this step commits of the columns at hand."""
        options, logits = self.options, self.logits
        if logits is None:
            raise RuntimeError("nothing was run yet")
        if options.guided:
            given, hidden = logits.chunk(2)
            logits = hidden + options.guidance_scale * (given - hidden)
            logits.index_fill_(-1, self.forbidden, -torch.inf)
        token, ratings = rate_all(logits, options, self.warpers, race=self.race, drawn=self.ranked)
        quota, closed = self.number, self.closed
        if self.may_end and options.remasking is None:
            # What is behind the first end-of-text token nobody gets.
            torch.logical_or(closed, self._text_ends().cumsum(-1), out=closed)
        room, remaining = self.score_room if commits_one(options) else None, None
        if room is None and not counts_ahead(options):
            remaining = (~closed).sum(-1)  # (rows,), to be written in as many steps as are left
            quota = (remaining + self.number - 1) // self.number
        chosen = choose_among(ratings, closed, quota, options, places=self.places, room=room)
        torch.where(chosen, token, self.block, out=self.block)
        torch.logical_or(closed, chosen, out=closed)
        if self.with_order:
            torch.where(chosen, self.forward_number, self.order, out=self.order)
        if options.remasking is not None and remaining is not None:
            torch.where(chosen, ratings.confidence, self.sure, out=self.sure)
            self._take_back((self.number > 1) & (remaining > 0))

    def _text_ends(self) -> torch.Tensor:
        # Where a text ends of the columns at hand, (rows, n).
        ends = self.block == self.ends_at
        return ends[0] if len(ends) == 1 else ends.any(0)

    def _take_back(self, may: torch.Tensor) -> None:
        # Never of a row whose region is written: its states are kept.
        written = (self.order > 0) & (self.order < self.forward_number) & may[:, None]
        doubt = -self.sure if self.doubt is None else self.doubt
        back = doubted_most(doubt, written, self.options, self.places)
        self.block.masked_fill_(back, self.options.mask_token_id)
        self.closed.masked_fill_(back, False)
        self.order.masked_fill_(back, 0)

    def run(self, key: str, work: Any, *shape: int) -> None:
        """Run a forward and what follows it, and count it."""
        with final_lengths(self.model, self._final_lengths):
            self.graphs.run((key, self.rows, *shape), work)
        self.canvas.forwards += 1

    def _final_lengths(self) -> torch.Tensor:
        return self.doubled(torch.tensor([self.limits[row] for row in range(self.rows)]))

    def select(self, places: list[int]) -> torch.Tensor:
        """Let only these of the rows go on; return the places as a tensor."""
        kept = sent(places, self.device)
        names = "block", "order", "closed", "sure"
        held, known = [getattr(self, name) for name in names], self.known_here
        logits, count = self.logits, self.rows
        self.canvas.rows = self.canvas.rows[kept]
        self.keeps = [self.keeps[place] for place in places]
        self.limits = [self.limits[place] for place in places]
        self.regions = [
            Region(**{name: tuple(value[p] for p in places) for name, value in vars(one).items()})
            for one in self.regions
        ]
        self.numbers, self.ended = self.numbers[..., kept], self.ended[kept]
        self._make_buffers()
        self._lay_tables()
        for name, old in zip(names, held, strict=True):
            getattr(self, name).copy_(old[kept])
        self.known_here.copy_(known[:, kept])
        both = torch.cat([kept, kept + count]) if self.options.guided else kept
        self.logits = None if logits is None else logits[both]
        self.graphs.forget()
        return both

    def advance(self, number: int) -> None:
        """Go to a region."""
        raise NotImplementedError

    def step(self, first_of_region: bool) -> None:
        """Run one forward, and commit."""
        raise NotImplementedError

    def decode(self) -> Decoded:
        """Write all regions."""
        canvas = self.canvas
        canvas.show()
        for number in range(len(self.steps)):
            self.advance(number)
            if not self._write(number):
                break
            self.put_back()
            is_last = number + 1 == len(self.steps)
            if self.may_end and not canvas.is_watched and not is_last:
                self.looked = Late(self._done_with(number))
        return canvas.result()

    def _write(self, region: int) -> bool:
        """Write a region; return whether some row goes on."""
        steps, canvas, options = self.steps[region], self.canvas, self.options
        masks = sum(self.regions[region].counts)
        pace = None if is_foreseeable(options) else Pace(self.recent, masks)
        for step in range(len(steps)):
            if not commits_one(options):
                self.number.copy_(self.numbers[self.taken[region] + step])
            if self.with_order:
                self.forward_number.fill_(canvas.forwards + 1)
            self.draw(region, step)
            self.step(step == 0)
            if canvas.is_watched:
                # Whoever is shown every step waits for every step, and sees no row beyond its end.
                self.put_back()
                canvas.show()
                if not self._go_on(self._done().tolist(), fewest=1):
                    return False
            elif self.looked is not None:
                # One step late: the device goes on with that one, and the host need not wait.
                done, self.looked = self.looked.read(), None
                if not self._go_on(done, fewest=(self.rows + 1) // 2):
                    return False
            if pace is not None and pace.is_written(self.closed):
                break
            if (step + 1) % self._looks_every() == 0 and step + 1 < len(steps):
                self.put_back()
                self.looked = Late(self._done())
        return True

    def _looks_every(self) -> int:
        """After how many steps the host asks which rows are done, besides at the end."""
        if self.canvas.is_watched or self.options.remasking is not None:
            return _NEVER
        return _LOOK if self.may_end else _NEVER

    def _done(self) -> torch.Tensor:
        # Which rows need no further forward, (rows,): nothing is taken back of a written region.
        return self.canvas.finished(self.closed.all(-1))

    def _done_with(self, region: int) -> torch.Tensor:
        # The same where a region is written, and all before it: a text has ended in one of them, or
        # there is no further one.
        torch.logical_or(self.ended, self._text_ends().any(-1), out=self.ended)
        return self.ended | self.is_last[region]

    def _go_on(self, done: list[bool], fewest: int) -> bool:
        """Whether some row is not done; where as many as `fewest` are, the others go on alone."""
        places = [place for place, ended in enumerate(done) if not ended]
        if len(done) - len(places) >= fewest and places:
            self.put_back()
            self.select(places)
        return bool(places)


def _exponential(buffer: torch.Tensor, generator: torch.Generator | None) -> None:
    buffer.exponential_(generator=generator)


def _uniform(buffer: torch.Tensor, generator: torch.Generator | None) -> None:
    buffer.uniform_(generator=generator)
