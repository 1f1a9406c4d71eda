"""The text while it is being written: tokens, what is still masked, who is done."""

from __future__ import annotations

from typing import Any

import torch

from .ancestral import Opening, Replacing, Unmasking, make_ancestry
from .choosing import (
    choose_commits,
    choose_remasked,
    draw_tokens,
    forbid,
    likely_tokens,
    make_warpers,
    rate_tokens,
    row_generators,
    show_noise,
)
from .moving import sent
from .options import Decoded, DecodingOptions, Observer, Progress
from .rules import shape_logits
from .stopping import Watch


class Canvas:
    """Prompts and new tokens of a batch, and one denoising step on any part of them.

    Attributes:
        limits: Columns each row has, shape (batch,); at least prompt and new tokens.
        tokens: Shape (batch, width), the mask where nothing is written.
        masked: Where something is to be written, shape (batch, width), bool: up to where the new
            tokens end that were asked for, which may be inside a block.
        rows: Rows still being written, shape (rows,).
        stops: Column behind the last new token that each row can have, shape (batch,): what ends a
            row early, an end-of-text token aside, shortens it.
        forwards: Forward passes so far; a reader counts those it runs.
        drafts: Row, column and token of what is drafted and not verified, for an observer.
    """

    def __init__(
        self,
        prompts: torch.Tensor,
        lengths: torch.Tensor,
        options: DecodingOptions,
        limits: torch.Tensor,
        observer: Observer | None = None,
        width: int | None = None,
    ) -> None:
        self.options, self.lengths, self.observer = options, lengths, observer
        self.limits = limits
        self.prompt_width = prompts.shape[1]
        self.ends = lengths + options.max_new_tokens
        self.stops = self.ends
        self._watch = Watch(options.stops, options.eos_token_ids, lengths)
        self._is_late = False
        batch, width = len(prompts), int(limits.max()) if width is None else width
        self.index = torch.arange(width, device=prompts.device)
        self.given = self.index < lengths[:, None]
        self.tokens = prompts.new_full((batch, width), options.mask_token_id)
        shared = min(self.prompt_width, width)
        self.tokens[:, :shared] = torch.where(
            self.given[:, :shared], prompts[:, :shared], options.mask_token_id
        )
        self._generators = row_generators(batch, options, prompts.device)
        self._ancestry = make_ancestry(options, limits, width, self._generators)
        # Where tokens are replaced, noise behind the last new one of a block changes with the rest.
        until = limits if isinstance(self._ancestry, Replacing) else self.ends
        self.masked = (self.tokens == options.mask_token_id) & (self.index < until[:, None])
        self.rows = torch.arange(batch, device=prompts.device)
        self.forwards = 0
        self.drafts: tuple[tuple[int, int, int], ...] = ()
        self.order = torch.zeros_like(self.tokens)
        self._confidence = torch.zeros(batch, width, device=prompts.device)
        self._used = torch.zeros_like(lengths)
        self._budget = torch.zeros_like(lengths)
        self._token_generators = row_generators(batch, options, prompts.device, tokens=True)
        self._warpers = make_warpers(options)
        self._eos = sent(options.eos_token_ids, prompts.device)
        self._never = sent(options.suppress_tokens, prompts.device)

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at the text after every forward."""
        return self.observer is not None or self.options.stops.is_set

    def show(self) -> None:
        """End the rows that something ends, and tell the observer, if there is one."""
        if self.options.stops.is_set:
            self._stop_rows()
        if self.observer is None:
            return
        width = int(self.ends.max())
        committed = ~self.masked & (self.index < self.stops[:, None])
        self.observer(
            Progress(
                canvas=self.tokens[:, :width].clone(),
                committed=committed[:, :width],
                lengths=self.lengths,
                ends=self.stops,
                rows=self.rows,
                forwards=self.forwards,
                drafts=self.drafts,
            )
        )

    def _stop_rows(self) -> None:
        options, late = self.options, self._watch.is_late()
        rows, width = self.rows, int(self.ends.max())
        inside = self.index[:width] < self.ends[rows, None]
        gaps = self.masked[rows, :width] & inside
        # How much of each row is final with all before it, (rows,).
        first = torch.where(gaps.any(-1), gaps.int().argmax(-1), self.ends[rows])
        final = first
        if options.remasking is not None:
            # What stands in an open block, or in an open text, may still be taken back.
            size = options.block_size
            open_from = first // size * size if size else torch.zeros_like(first)
            final = torch.where(first < self.ends[rows], open_from, first)
        stops = self.stops.clone()
        tokens = self.tokens[rows].cpu()
        for line, (row, count) in enumerate(zip(rows.tolist(), final.tolist(), strict=True)):
            end = self._watch.end_of(row, tokens[line, :count])
            if end is not None:
                stops[row] = end
        if late:
            self._is_late = True
            written = torch.maximum(first, self.lengths[rows])
            stops[rows] = torch.minimum(stops[rows], written)
        self.stops = stops

    def is_stopped(self, row: int) -> bool:
        """Whether something ended a row, an end-of-text token aside."""
        return self._is_late or bool(self.stops[row] < self.ends[row])

    def read(self, columns: torch.Tensor, *, noise: bool = True) -> torch.Tensor:
        """What the model is shown of the active rows at `columns`, shape (rows, n).

        With guidance the same rows follow once more with their prompts masked: (2 * rows, n).
        """
        rows = self.rows[:, None]
        tokens = self.tokens[rows, columns]
        if self.options.guided:
            hidden = tokens.masked_fill(self.given[rows, columns], self.options.mask_token_id)
            return torch.cat([tokens, hidden])
        if not (noise and self.options.noise_tokens):
            return tokens
        if isinstance(self._ancestry, Replacing):
            return self._ancestry.shown(tokens, self.rows, columns)
        active = [self._generators[row] for row in self.rows.tolist()]
        # Behind its end a row's last block has noise as well; what a longer row has beside it must
        # cost it no draws.
        open_ones = (tokens == self.options.mask_token_id) & (columns < self.limits[rows])
        return show_noise(tokens, open_ones, self.options, active)

    def wanted(self, columns: torch.Tensor) -> torch.Tensor:
        """Where the active rows have something to write at `columns`, each shape (rows, n), bool.

        Nothing behind a row's first end-of-text token, which nobody gets, unless remasking may take
        that back.
        """
        masked = self.masked[self.rows[:, None], columns]
        if not len(self._eos) or self.options.remasking:
            return masked
        return masked & (columns < self._text_ends())

    def in_turn(self, columns: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Which of the `masked` columns of each row's block, (rows, block), are written now.

        All of them, or with `sub_block_size` those of the first part that has any.
        """
        part = self.parts(columns)
        return masked & (part == part.masked_fill(~masked, 2**31).amin(-1, keepdim=True))

    def parts(self, columns: torch.Tensor) -> torch.Tensor:
        """The part of its block that each column is in, counted from 0, the shape of `columns`."""
        block, size = self.options.block_size, self.options.sub_block_size
        return columns % block // size if block and size else torch.zeros_like(columns)

    def _text_ends(self) -> torch.Tensor:
        # The column of each active row's first end-of-text token, or the width, (rows, 1).
        return (~self._ended()[self.rows]).sum(-1, keepdim=True)

    def final_lengths(self) -> torch.Tensor:
        """How long the text of each active row will be, as many rows as `read` returns."""
        limits = self.limits[self.rows]
        return torch.cat([limits, limits]) if self.options.guided else limits

    def begin(self, masked: torch.Tensor, beginning: torch.Tensor) -> None:
        """Start counting the steps of a block, or of the text, that write `masked` (rows, n).

        So in the active rows that are `beginning` (rows,).
        """
        rows, count = self.rows[beginning], masked[beginning].sum(-1)
        steps = self.options.max_denoising_steps
        if isinstance(self._ancestry, Replacing):
            steps = self._ancestry.steps
        self._budget[rows] = count if steps is None else torch.full_like(count, steps)
        self._used[rows] = 0

    def denoise(self, logits: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor) -> None:
        """Commit what this step commits, of the `columns` that are `masked`, each (rows, width).

        `logits` (n, vocab) are of the masked, row after row, and written over; with guidance those
        without the prompt follow, (2 * n, vocab).
        """
        options = self.options
        logits = logits.float()
        if options.guided:
            given, hidden = logits.chunk(2)
            logits = hidden + options.guidance_scale * (given - hidden)
        if options.rules.is_set:
            logits, masked = self._follow_rules(logits, columns, masked)
        if options.suppress_tokens:
            logits.index_fill_(1, self._never, -torch.inf)
        rows = self.rows.tolist()
        active = [self._generators[row] for row in rows]
        drawing = [self._token_generators[row] for row in rows]
        remaining = masked.sum(-1)
        left = (self._budget[self.rows] - self._used[self.rows]).clamp(min=1)
        if self._ancestry is not None:
            self._draw_back(logits, columns, masked, left)
            self._used[self.rows[remaining > 0]] += 1
            return
        counts = remaining.tolist()
        ratings = rate_tokens(logits, counts, options, active, self._warpers, drawing)
        chosen = choose_commits(ratings, masked, (remaining + left - 1) // left, options)
        among = chosen[masked]
        token = logits[among].argmax(-1) if ratings.token is None else ratings.token[among]
        at = self._write(columns, chosen, token)
        self._confidence[at] = ratings.confidence[among].float()
        self._used[self.rows[remaining > 0]] += 1
        if options.remasking:
            # Never of a row whose block is written: its states are kept.
            self._take_back(columns, (left > 1) & (remaining > 0), active)

    def _write(
        self, columns: torch.Tensor, chosen: torch.Tensor, token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make tokens (n,) final where `chosen`, of `columns`, each (rows, width); return where."""
        at = self.rows[:, None].expand_as(columns)[chosen], columns[chosen]
        self.tokens[at] = token
        self.masked[at] = False
        self.order[at] = self.forwards
        return at

    def _draw_back(
        self, logits: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor, left: torch.Tensor
    ) -> None:
        """Go one step of the reverse process back; `left` (rows,) counts them, this one included.

        The other arguments are those of `denoise`.
        """
        rows = self.rows.tolist()
        active = [self._generators[row] for row in rows]
        drawing = [self._token_generators[row] for row in rows]
        forbid(logits, self.options.mask_token_id)
        if isinstance(self._ancestry, Replacing):
            drawn_by = active, drawing
            token = self._ancestry.step(
                logits, self.rows, columns, masked, left, drawn_by, self._warpers
            )
            # Only what the last step leaves is text.
            chosen = masked & (left == 1)[:, None]
            self._write(columns, chosen, token[chosen[masked]])
        elif isinstance(self._ancestry, Unmasking):
            begins = self._used[self.rows] == 0
            self._ancestry.begin(self.rows[begins], columns[begins], masked[begins])
            chosen = self._ancestry.due(self.rows, columns, masked)
            among, counts = chosen[masked], chosen.sum(-1).tolist()
            likely = likely_tokens(logits[among], self._warpers)
            self._write(columns, chosen, draw_tokens(likely, counts, drawing))
        elif isinstance(self._ancestry, Opening):
            begins, drawn_by = self._used[self.rows] == 0, (active, drawing)
            self._write(
                columns,
                *self._ancestry.step(logits, self.rows, masked, begins, drawn_by, self._warpers),
            )

    def _follow_rules(
        self, logits: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (n, vocab) by the rules, and which positions (rows, width) they are of.

        That is all that are `masked`, or where rules are ordered the first of each row.
        """
        rules, rows = self.options.rules, self.rows.tolist()
        if rules.is_ordered:
            first = masked & (masked.cumsum(-1) == 1)
            logits, masked = logits[first[masked]], first
        row, _ = masked.nonzero(as_tuple=True)
        at = columns[masked]  # (n,)
        before = at.tolist()
        final = ~self.masked & (self.index < self.ends[:, None])
        texts, taken = [], 0
        for number, count in zip(rows, masked.sum(-1).tolist(), strict=True):
            if rules.is_ordered and count:
                text = self.tokens[number, : before[taken]]
            else:
                text = self.tokens[number][final[number]]
            texts.append((number, text, count))
            taken += count
        places = at - self.lengths[self.rows[row]]
        new, ends = self.options.max_new_tokens, self.options.eos_token_ids
        return shape_logits(logits, texts, places, rules, eos=ends, new=new), masked

    def _take_back(self, columns: torch.Tensor, may: torch.Tensor, active: list[Any]) -> None:
        rows = self.rows[:, None].expand_as(columns)
        order = self.order[rows, columns]
        written = (order > 0) & (order < self.forwards) & may[:, None]
        back = choose_remasked(self._confidence[rows, columns], written, self.options, active)
        at = rows[back], columns[back]
        self.tokens[at] = self.options.mask_token_id
        self.masked[at] = True
        self.order[at] = 0

    def finished(self, settled: torch.Tensor) -> torch.Tensor:
        """Which active rows need no further forward, shape (rows,), bool.

        A row is done when everything before its end is written: `max_new_tokens`, or the first
        end-of-text token among the new ones, if remasking leaves it (`settled`, (rows,)).
        """
        if self._is_late:
            return torch.ones_like(self.rows, dtype=torch.bool)
        stop = self.stops[self.rows, None]
        if len(self._eos):
            ends = self._text_ends() + 1
            if self.options.remasking:
                ends = torch.where(settled[:, None], ends, stop)
            stop = torch.minimum(stop, ends)
        return ~(self.masked[self.rows] & (self.index < stop)).any(-1)

    def _ended(self) -> torch.Tensor:
        # Where a row is at or past its first end-of-text token, shape (batch, width).
        new = ~self.given & (self.index < self.stops[:, None]) & ~self.masked
        return (torch.isin(self.tokens, self._eos) & new).cumsum(-1) > 0

    def leave(self, done: torch.Tensor) -> torch.Tensor:
        """Let the rows that are done leave; return which of the active rows stay, int."""
        kept = (~done).nonzero().squeeze(-1)
        self.rows = self.rows[kept]
        return kept

    def result(self) -> Decoded:
        """Cut the new tokens out and pad each row after its end."""
        columns = self.lengths[:, None] + self.index[: self.options.max_new_tokens]
        ended = self._ended().gather(1, columns)
        past_end = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
        past_end |= columns >= self.stops[:, None]
        shared = slice(0, self.prompt_width)
        return Decoded(
            rows=self.tokens.gather(1, columns).masked_fill(past_end, self.options.pad_token_id),
            prompts=self.tokens[:, shared],
            order=self.order.gather(1, columns).masked_fill(past_end, 0),
            prompt_order=self.order[:, shared],
            forwards=self.forwards,
            new=(~past_end).sum(-1),
        )
