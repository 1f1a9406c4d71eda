"""Decoding on a GPU, written by dllm-convert 0.1.0.

The same steps, queued one behind the other without a look at what became of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from .decoding_dllm import (
    BlockCache,
    Canvas,
    choose_among,
    depends_on_length,
    doubted_most,
    final_lengths,
    make_warpers,
    rate_all,
)
from .gated_dllm import Late, has_causal_drafts, sent
from .settings_dllm import Decoded, DecodingOptions, Observer

# Decoding on a GPU: steps are queued one behind the other, and the host rarely asks for a result.
#
# The same tokens as `decode_blocks` and `decode_canvas` write, otherwise laid out. There the host
# looks after every step which masks are left, and runs no row and no logit too much: on a CPU that
# costs nothing, and saves most. Here a look costs more than what it saves. So every row and every
# column of a block takes part in every step, what is written is kept by `torch.where`, and rows go
# from block to block in step.


_RECENT = 4
"""Regions whose number of steps tells what the next takes,"""
_SHARE = 0.75
"""and after which share of them the host looks whether it is written."""
_LOOK = 8
"""Steps of one region after which the host looks whether all rows have ended,"""
_NEVER = 1 << 30
"""and where there is nothing to see."""


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
        tables = [(region.starts, region.begins, region.ends) for region in self.regions]
        self.tables = sent(tables, self.device)  # (regions, 3, rows)
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
        self._make_buffers()

    def _make_buffers(self) -> None:
        rows, n = len(self.keeps), self.columns_at_hand
        new = self.canvas.tokens.new_zeros
        self.block, self.columns, self.order = new(rows, n), new(rows, n), new(rows, n)
        self.closed = torch.ones(rows, n, dtype=torch.bool, device=self.device)
        # Each token that ends a text where it would end one, and no token elsewhere, (rows, n).
        self.ends_at = [new(rows, n) for _ in self.options.eos_token_ids]
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
        canvas, (starts, begins, ends) = self.canvas, self.tables[number]
        torch.add(starts[:, None], self.places, out=self.columns)
        at = canvas.rows[:, None], self.columns
        self.block.copy_(canvas.tokens[at])
        inside = (self.columns >= begins[:, None]) & (self.columns < ends[:, None])
        torch.logical_not(canvas.masked[at] & inside, out=self.closed)
        is_new = self.columns >= canvas.lengths[canvas.rows, None]
        for held, token in zip(self.ends_at, self.options.eos_token_ids, strict=True):
            held.copy_(torch.where(is_new, token, -1))
        if self.with_order:
            self.order.copy_(canvas.order[at])

    def put_back(self) -> None:
        """Write what is at hand into the canvas."""
        canvas = self.canvas
        at = canvas.rows[:, None], self.columns
        canvas.tokens[at] = self.block
        # The mask is never written: where it stands, something is still to be.
        ends = canvas.ends[canvas.rows, None]
        canvas.masked[at] = (self.block == self.options.mask_token_id) & (self.columns < ends)
        if self.with_order:
            canvas.order[at] = self.order

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
            ends = self.block == self.ends_at[0]
            for other in self.ends_at[1:]:
                ends = ends | (self.block == other)
            torch.logical_or(closed, ends.cumsum(-1), out=closed)
        places, remaining = self.places if commits_one(options) else None, None
        if places is None and not counts_ahead(options):
            remaining = (~closed).sum(-1)  # (rows,), to be written in as many steps as are left
            quota = (remaining + self.number - 1) // self.number
        chosen = choose_among(ratings, closed, quota, options, places=places)
        torch.where(chosen, token, self.block, out=self.block)
        torch.logical_or(closed, chosen, out=closed)
        if self.with_order:
            torch.where(chosen, self.forward_number, self.order, out=self.order)
        if options.remasking is not None and remaining is not None:
            torch.where(chosen, ratings.confidence, self.sure, out=self.sure)
            self._take_back((self.number > 1) & (remaining > 0))

    def _take_back(self, may: torch.Tensor) -> None:
        # Never of a row whose region is written: its states are kept.
        written = (self.order > 0) & (self.order < self.forward_number) & may[:, None]
        doubt = -self.sure if self.doubt is None else self.doubt
        back = doubted_most(doubt, written, self.options)
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
        held = self.block, self.columns, self.order, self.closed, self.sure, *self.ends_at
        logits, count = self.logits, self.rows
        self.canvas.rows = self.canvas.rows[kept]
        self.keeps = [self.keeps[place] for place in places]
        self.limits = [self.limits[place] for place in places]
        self.regions = [
            Region(**{name: tuple(value[p] for p in places) for name, value in vars(one).items()})
            for one in self.regions
        ]
        self.tables, self.numbers = self.tables[..., kept], self.numbers[..., kept]
        self._make_buffers()
        for new, old in zip(
            (self.block, self.columns, self.order, self.closed, self.sure, *self.ends_at),
            held,
            strict=True,
        ):
            new.copy_(old[kept])
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
                self.looked = Late(self._done())
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


# Forward passes of a decoding on a GPU: whole texts, or one block of every row.


_SHORTEST = 256
"""Columns of the cache that a recorded forward reads at the least; the next lengths are doubled,"""
_LONGEST = 1024
"""from here on they are multiples."""


class QueuedCanvas(QueuedDecoder):
    """MDLM: every forward runs the whole text, and has logits of the columns at hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wanted = self.columns  # flat places in (rows * width) of the logits
        self.mask: torch.Tensor | None = None
        self._lay_out()

    def _lay_out(self) -> None:
        width = self.canvas.tokens.shape[1]
        self.positions = self.doubled(self.canvas.index.expand(self.rows, -1))
        self.mask = None
        if any(limit < width for limit in self.limits):
            # Behind its end a row has no text; no mask is the faster forward.
            valid = self.canvas.index < self.canvas.limits[self.canvas.rows, None]
            seen = valid[:, None, None].expand(-1, 1, width, -1)
            self.mask = self.doubled(seen).contiguous()

    def select(self, places: list[int]) -> torch.Tensor:
        """Let only these of the rows go on."""
        both = super().select(places)
        self._lay_out()
        self._aim()
        return both

    def _aim(self) -> None:
        width = self.canvas.tokens.shape[1]
        line = torch.arange(self.rows, device=self.device)[:, None] * width
        shifted = (self.columns - int(self.options.token_shift)).clamp(min=0)
        flat = (line + shifted).flatten()
        both = [flat, flat + self.rows * width] if self.options.guided else [flat]
        self.wanted = torch.cat(both)

    def advance(self, number: int) -> None:
        """Go to a window."""
        self.enter(number)
        wanted = self.wanted
        self._aim()
        if wanted.shape == self.wanted.shape:
            # Where a recorded step looks.
            self.wanted = wanted.copy_(self.wanted)

    def step(self, first_of_region: bool) -> None:
        """Run the whole text, and commit."""
        self.run("text", self._work)

    def _work(self) -> None:
        canvas = self.canvas
        rows = canvas.rows
        is_whole = len(rows) == len(canvas.tokens)
        tokens = canvas.tokens if is_whole else canvas.tokens[rows]
        masked = canvas.masked[rows] if self.options.noise_tokens else None
        output = self.model(
            self.shown(tokens, canvas.index, masked),
            attention_mask=self.mask,
            position_ids=self.positions,
            logits_at=self.wanted,
            use_cache=False,
        )
        self.keep(output.logits.view(-1, self.columns_at_hand, output.logits.shape[-1]))
        self.denoise()
        at = rows[:, None], self.columns
        canvas.tokens[at] = self.block
        if self.options.noise_tokens:
            ends = canvas.ends[rows, None]
            canvas.masked[at] = (self.block == self.options.mask_token_id) & (self.columns < ends)


class QueuedBlocks(QueuedDecoder):
    """BD3LM: a forward runs one block of every row behind its clean ones, or two at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.room = self._bucket(self.canvas.tokens.shape[1], self.graphs.wanted)
        self.cache = BlockCache(self.room)
        self.cache.frozen = True
        self.keys = torch.arange(self.room, device=self.device)
        # Other implementations would build a mask of their own where none is given.
        self.gated, self.causal_drafts = self.model.is_gated, has_causal_drafts(self.model.config)
        self.may_be_bare = self.model.config._attn_implementation == "sdpa" and not self.gated
        self.behind = torch.zeros_like(self.columns)  # the columns of the block before
        self.written = torch.zeros_like(self.block)  # and its tokens
        self.line = self._line()
        self.visible, self.region = 0, 0
        self.masks: dict[str, torch.Tensor] = {}
        self._read_prompt()

    def _line(self) -> torch.Tensor:
        # The number of each row of the cache, (rows, 1).
        count = self.rows * 2 if self.options.guided else self.rows
        return torch.arange(count, device=self.device)[:, None]

    def _bucket(self, width: int, in_buckets: bool) -> int:
        # A recorded forward reads as many columns in every replay: more than there are yet.
        if not in_buckets:
            return width
        length = _SHORTEST
        while length < min(width, _LONGEST):
            length *= 2
        return max(length, -(-width // _LONGEST) * _LONGEST) if width > _LONGEST else length

    def _read_prompt(self) -> None:
        """Run the clean blocks of the prompts into the cache, all in one forward."""
        starts = self.regions[0].starts
        width = max(starts)
        if not width:
            return
        # One forward for all: (rows, width) up to the latest start. What a row has past its own is
        # rubbish, and is written over when the row's blocks are run.
        columns = self.canvas.index[:width].expand(self.rows, -1)
        mask = None
        if self.options.causal_context:
            mask = (columns[:1, :, None] >= columns[:1, None])[:, None]
            mask = self.doubled(mask.expand(self.rows, -1, -1, -1))
        tokens, last = self.canvas.tokens[:, :width], self.columns[:0, 0]
        if self.options.token_shift:
            # The last clean token of a row predicts the first one of its block.
            last = sent(
                [row * width + max(at - 1, 0) for row, at in enumerate(starts)], self.device
            )
        if self.options.guided:
            given = columns < self.canvas.lengths[:, None]
            tokens = torch.cat([tokens, tokens.masked_fill(given, self.options.mask_token_id)])
            last = torch.cat([last, last + self.rows * width])
        self.cache.put(None, width)

        def work() -> None:
            logits = self.model(
                tokens,
                attention_mask=mask,
                position_ids=self.doubled(columns),
                logits_at=last,
                past_key_values=self.cache,
                use_cache=True,
            ).logits
            if len(logits):
                self.keep(logits[:, None])

        self.run("prompt", work, width)

    def advance(self, number: int) -> None:
        """Go to the next block of every row."""
        self.region = number
        fused = bool(self.steps[number]) and not self.options.causal_context
        if number:
            if not fused:
                # Nothing to denoise, or read otherwise than denoised: the block alone.
                self._see("clean", self.columns, causal=self.options.causal_context)
                self.run("clean", self._run_clean, self.visible)
            self.behind.copy_(self.columns)
            self.written.copy_(self.block)
        self.enter(number)
        self.ahead = fused and number > 0
        if self.ahead:
            self._see("ahead", torch.cat([self.behind, self.columns], 1))
        self._see("open", self.columns, causal=self.causal_drafts)

    def _see(self, name: str, columns: torch.Tensor, *, causal: bool = False) -> None:
        """Make the mask of a forward over columns (rows, queries): up to the end of a block."""
        n, region = self.columns_at_hand, self.regions[self.region]
        if name == "clean":
            region = self.regions[self.region - 1]
        self.visible = self._bucket(region.width, self.graphs.wanted)
        bare = self.may_be_bare and not causal and name != "ahead" and not self.graphs.wanted
        if bare and len(set(region.starts)) == 1:
            self.masks.pop(name, None)
            return
        ends = columns[:, n - 1 :: n].repeat_interleave(n, 1, output_size=columns.shape[1])
        last = columns if causal else ends
        seen = (self.keys[: self.visible] <= last[..., None])[:, None]
        seen = self.doubled(seen)
        held = self.masks.get(name)
        if held is None or held.shape != seen.shape:
            self.masks[name] = seen
        else:
            held.copy_(seen)

    def step(self, first_of_region: bool) -> None:
        """Run the block, in its first step behind the one before, and commit."""
        if first_of_region and self.ahead:
            self.run("ahead", self._run_ahead, self.visible)
        else:
            self.run("open", self._run_open, self.visible)

    def _forward(self, name: str, tokens: torch.Tensor, columns: torch.Tensor) -> Any:
        mask, both = self.masks.get(name), self.doubled(columns)
        self.cache.put((self.line, both), self.visible)
        noisy = {}
        if self.gated and name == "open":
            noisy = {"noisy": torch.ones_like(both, dtype=torch.bool)}
        return self.model(
            tokens,
            attention_mask=mask,
            position_ids=both,
            past_key_values=self.cache,
            use_cache=True,
            sees_all=mask is None,
            **noisy,
        ).logits

    def _run_open(self) -> None:
        tokens = self.shown(self.block, self.columns, self.is_open)
        logits = self._forward("open", tokens, self.columns)
        # Shifted, a place predicts the next one; the first was predicted before.
        shift = int(self.options.token_shift)
        self.keep(logits[:, : logits.shape[1] - shift], first=shift)
        self.denoise()

    def _run_clean(self) -> None:
        logits = self._forward("clean", self.shown(self.block, self.columns), self.columns)
        if self.options.token_shift:
            self.keep(logits[:, -1:])

    def _run_ahead(self) -> None:
        n, shift = self.columns_at_hand, int(self.options.token_shift)
        columns = torch.cat([self.behind, self.columns], 1)
        if self.options.guided:
            tokens = self.shown(torch.cat([self.written, self.block], 1), columns)
        else:
            shown = self.shown(self.block, self.columns, self.is_open)
            tokens = torch.cat([self.written, shown], 1)
        logits = self._forward("ahead", tokens, columns)
        self.keep(logits[:, n - shift : 2 * n - shift])
        self.denoise()

    def select(self, places: list[int]) -> torch.Tensor:
        """Let only these of the rows go on."""
        behind, written = self.behind, self.written
        both = super().select(places)
        kept = both[: self.rows]
        self.behind, self.written = behind[kept], written[kept]
        self.cache.batch_select_indices(both)
        self.line = self._line()
        self.masks.clear()
        self._see("open", self.columns)
        return both


def is_queued(device: torch.device, options: DecodingOptions) -> bool:
    """Whether a decoding is queued: not on a CPU, with states kept of a text, or by rules.

    Rules are asked on the host, with the text as it is.
    """
    return device.type != "cpu" and not (options.approximate_cache or options.rules.is_set)


def decode_queued(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
    *,
    told: list[int],
    with_order: bool = True,
    record: bool = True,
) -> Decoded:
    """Decode on a device that works while the host does something else.

    The arguments are those of `decode_blocks` and `decode_canvas`.

    Args:
        model: A diffusion model.
        prompts: Right-padded prompts, shape (batch, width).
        lengths: Tokens of each, shape (batch,).
        options: How text is denoised.
        observer: Called after the prompt and after every denoising forward.
        told: The same lengths, which the host knows already.
        with_order: Whether somebody asks when each token was committed.
        record: Whether steps may be recorded as CUDA graphs.
    """
    size = options.block_size or 1
    ends = [(length + options.max_new_tokens + size - 1) // size * size for length in told]
    limits = sent(ends, prompts.device)
    canvas = Canvas(prompts, lengths, options, limits=limits, observer=observer, width=max(ends))
    # A graph is of one device, and what depends on the length is looked up on the host.
    record = record and len({weight.device for weight in model.parameters()}) == 1
    graphs = Graphs(prompts.device, wanted=record and not depends_on_length(model))
    kind = QueuedBlocks if options.block_size else QueuedCanvas
    decoder = kind(model, canvas, told, ends, graphs, with_order=with_order)
    decoded = decoder.decode()
    model.graph_replays = graphs.replays
    return decoded


# What is written when, counted before anything runs: the host asks a device for none of it.


@dataclass(frozen=True)
class Region:
    """Columns that every row writes in the same forwards: a block, a window, or the whole text.

    Attributes:
        starts: First of the columns at hand in each row; every row has as many.
        begins: First of them that the row may write.
        ends: The one behind the last that the row may write.
        counts: Masks of each row there; 0 where a row has no such region, or nothing to write.
    """

    starts: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns at hand up to the last one of any row."""
        return max(self.ends)


def _spans(
    masked: list[int], length: int, limit: int, options: DecodingOptions
) -> list[tuple[int, int]]:
    """Return where a row's regions begin and end, from its `masked` columns in order."""
    if size := options.block_size:
        return [(begin, begin + size) for begin in range(masked[0] // size * size, limit, size)]
    if size := options.block_length:
        # Counted from the first new token: masks in a prompt lie in negative windows.
        windows = sorted({(column - length) // size for column in masked})
        firsts = [length + window * size for window in windows]
        return [(max(first, 0), min(first + size, limit)) for first in firsts]
    return [(masked[0], limit)]


def plan_regions(
    masked: torch.Tensor, lengths: Sequence[int], limits: Sequence[int], options: DecodingOptions
) -> tuple[int, list[Region]]:
    """Return how many columns are at hand at once, and the regions in order.

    Rows go from region to region in step: row r writes its third block beside every other row's
    third one. A row that has fewer stays at its last.

    Args:
        masked: Where something is to be written, shape (batch, width), bool, on the CPU.
        lengths: Tokens of each prompt.
        limits: Columns of each row.
        options: How text is denoised.
    """
    spans = [
        _spans(row.nonzero().squeeze(-1).tolist(), length, limit, options)
        for row, length, limit in zip(masked, lengths, limits, strict=True)
    ]
    columns = max(end - begin for row in spans for begin, end in row)
    before = torch.nn.functional.pad(masked.long().cumsum(-1), (1, 0)).tolist()
    regions = []
    for number in range(max(map(len, spans))):
        here = [row[min(number, len(row) - 1)] for row in spans]
        regions.append(
            Region(
                # No column is at hand twice: a row that ends early has earlier ones beside its own.
                starts=tuple(min(begin, masked.shape[1] - columns) for begin, _ in here),
                begins=tuple(begin for begin, _ in here),
                ends=tuple(end for _, end in here),
                counts=tuple(
                    counted[end] - counted[begin] if number < len(row) else 0
                    for counted, (begin, end), row in zip(before, here, spans, strict=True)
                ),
            )
        )
    return columns, regions


def is_foreseeable(options: DecodingOptions) -> bool:
    """Whether how many tokens a step commits depends on nothing that the model says."""
    unsure = options.confidence_threshold is not None or options.entropy_bound is not None
    return not unsure and options.remasking is None


def counts_ahead(options: DecodingOptions) -> bool:
    """Whether how many tokens each step commits can be counted before anything is written.

    Where a text may end early fewer are left, and each step commits its share of those.
    """
    return is_foreseeable(options) and (not options.eos_token_ids or commits_one(options))


def commits_one(options: DecodingOptions) -> bool:
    """Whether the number of steps asks each of them for one token."""
    return options.max_denoising_steps is None and options.remasking is None


def plan_steps(counts: Sequence[int], options: DecodingOptions) -> list[list[int]]:
    """Return a row of numbers for each step that writes masks, `counts` of each row.

    Where it can be foreseen they are how many tokens each row commits; else how many steps it has
    left, of as many steps as it can take at the most.
    """
    most, plan = options.max_denoising_steps, []
    budgets = [count if most is None else most for count in counts]
    remaining, foreseeable = list(counts), counts_ahead(options)
    steps = max(
        budget if options.remasking else min(budget, count)
        for budget, count in zip(budgets, counts, strict=True)
    )
    for step in range(steps if any(counts) else 0):
        left = [max(budget - step, 1) for budget in budgets]
        if not foreseeable:
            plan.append(left)
            continue
        if not any(remaining):
            break
        quota = [-(-count // steps) for count, steps in zip(remaining, left, strict=True)]
        remaining = [count - now for count, now in zip(remaining, quota, strict=True)]
        plan.append(quota)
    return plan


# Random numbers of a decoding that does not know which rows are still written.


_MANY = (1 << 64) - 1
KINDS = ("token", "order", "remask", "noise")

Draw = Callable[[torch.Tensor, torch.Generator | None], object]
"""Fills a tensor in place with numbers of a generator, or of torch's global one."""


def mixed(*numbers: int) -> int:
    """Return a seed out of several numbers (SplitMix64: each bit changes half of the others)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MANY
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MANY
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MANY
        state ^= state >> 31
    return state >> 1


class Draws:
    """A generator per row, sown anew for every draw.

    What a row gets depends on its seed, the region and the step alone: not on its neighbours, nor
    on how many forwards were run for them while it had nothing to write.
    """

    def __init__(self, options: DecodingOptions, device: torch.device) -> None:
        self._seeds = options.seeds
        self._generators = [torch.Generator(device) for _ in options.seeds]

    def fill(
        self,
        buffer: torch.Tensor,
        draw: Draw,
        kind: str,
        place: tuple[int, int],
        rows: Sequence[int],
        parts: Sequence[slice],
    ) -> None:
        """Fill a buffer (rows, n, ...), with seeds only the part of each row that is its own.

        Args:
            buffer: What is filled, in place.
            draw: Fills a tensor.
            kind: What the numbers decide, one of `KINDS`.
            place: Number of the region, and of the step in it.
            rows: Number of each row in the batch.
            parts: Which part of the buffer belongs to each.
        """
        if not self._seeds:
            draw(buffer, None)
            return
        for line, row, part in zip(buffer, rows, parts, strict=True):
            generator = self._generators[row]
            generator.manual_seed(mixed(self._seeds[row], KINDS.index(kind), *place))
            draw(line[part], generator)


# Work that a device does again and again: recorded once, and replayed.


_WARM = 2
"""Times that a piece of work is run before it is recorded: what it needs is then made."""


def can_record(device: torch.device) -> bool:
    """Whether work on a device can be recorded."""
    return device.type == "cuda" and torch.cuda.is_available()


def recorded(work: Callable[[], None], pool: Any) -> Any:
    """Record a piece of work, without doing it, as something that is replayed.

    Raises a RuntimeError if the work asks the device for numbers on its way.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph


class Graphs:
    """Runs pieces of work again and again; on a CUDA device as a recorded graph.

    A forward of one block launches hundreds of kernels that take less time than their launches. A
    graph launches them at once. It reads and writes the same memory in every replay, so what is run
    works on buffers that stay, and draws nothing.

    Args:
        wanted: Whether to record; only a CUDA device can.

    Attributes:
        replays: How often a graph was replayed.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self.wanted = wanted and can_record(device)
        self.replays = 0
        self._made: dict[Hashable, Any] = {}
        self._seen: Counter[Hashable] = Counter()
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do a piece of work; what has the same key does the same, on the same buffers."""
        self._seen[key] += 1
        if self.wanted and key not in self._made and self._seen[key] > _WARM:
            self._record(key, work)
        if key in self._made:
            self._made[key].replay()
            self.replays += 1
        else:
            work()

    def forget(self) -> None:
        """Drop all recordings: the buffers are others."""
        self._made.clear()
        self._seen.clear()
        self._pool = None

    def _record(self, key: Hashable, work: Callable[[], None]) -> None:
        try:
            graph = recorded(work, self._pool)
        except RuntimeError:
            # Recording ran nothing: the work is done as before.
            self.wanted = False
            return
        self._made[key], self._pool = graph, graph.pool()
