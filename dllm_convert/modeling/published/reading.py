"""Forward passes of decoding: what is run, behind which cache, and where logits are taken."""

from __future__ import annotations

from typing import Any

import torch

from .cache import BlockCache
from .canvas import Canvas
from .gated import has_causal_drafts
from .options import DecodingOptions
from .rope import final_lengths


class CanvasReader:
    """Forward passes over whole texts or, with `approximate_cache`, over one window of them."""

    def __init__(self, model: Any, canvas: Canvas) -> None:
        self.model, self.canvas, self.options = model, canvas, canvas.options
        self.rows = len(canvas.rows)
        self.cache: BlockCache | None = None
        if self.options.approximate_cache:
            self.cache = BlockCache(int(canvas.ends.max()))
            self.cache.frozen = True

    def read(self, masked: torch.Tensor, window: torch.Tensor, everything: bool) -> torch.Tensor:
        """Return logits of the masked positions, those without the prompt behind them."""
        canvas, shift = self.canvas, int(self.options.token_shift)
        self.rows = len(masked)
        width = len(canvas.index) if self.cache is not None else masked.shape[1]
        # Columns that are run, (rows, n): all, or the window alone behind kept states of the rest.
        columns = canvas.index[:width].expand(len(masked), -1)
        first = torch.zeros_like(canvas.rows)
        if self.cache is not None and not everything:
            size = self.options.block_length or 1
            # With token shift one column more: the one that predicts the window's first token.
            first = canvas.lengths[canvas.rows] + window * size - shift
            steps = torch.arange(size + shift, device=masked.device)
            columns = (first[:, None] + steps).clamp(0, width - 1)
        row, column = masked.nonzero(as_tuple=True)  # each (wanted,), row after row
        # Flat places in (rows * n) whose logits are wanted; shifted, that of the column before.
        at = row * columns.shape[1] + column - shift - first[row]
        # Rows end at different columns, (rows, width): behind its end a row has no text, and no
        # mask is the faster forward.
        valid = canvas.index[:width] < canvas.ends[canvas.rows, None]
        inputs: dict[str, Any] = {"use_cache": False}
        mask: torch.Tensor | None = None if bool(valid.all()) else valid.long()
        if self.cache is not None:
            # A mask (rows, 1, n, width): the cache holds columns past a row's end, seen by nobody.
            self.cache.place(_doubled(columns, self.options), width)
            inputs = {"past_key_values": self.cache, "use_cache": True}
            mask = valid[:, None, None].expand(-1, -1, columns.shape[1], -1)
        return _forward(self.model, canvas, columns, mask, at, **inputs)

    def select(self, kept: torch.Tensor) -> None:
        """Keep only these rows."""
        if self.cache is not None and len(kept):
            # The cache has (rows, ...), with guidance (2 * rows, ...) as it was last read.
            self.cache.batch_select_indices(_behind(kept, self.rows, self.options))


class BlockReader:
    """Forward passes over one block of every active row, behind the row's clean blocks."""

    def __init__(self, model: Any, canvas: Canvas, size: int) -> None:
        self.model, self.canvas, self.options, self.size = model, canvas, canvas.options, size
        # The first masked column of a row begins its work; every row has one.
        first = canvas.masked.long().argmax(-1)
        self.starts = first // size * size
        self.cache = BlockCache(canvas.tokens.shape[1])
        self.cache.frozen = True
        # With token shift: logits of each row's next first token, (rows, vocab).
        self.previous: torch.Tensor | None = None
        # Other implementations would build a mask of their own where none is given, and so would
        # the base that a gated model is.
        self.gated, self.causal_drafts = model.is_gated, has_causal_drafts(model.config)
        closed = self.gated or self.causal_drafts
        self.may_be_bare = model.config._attn_implementation == "sdpa" and not closed

    def columns(self) -> torch.Tensor:
        """Columns of the block each active row is at, shape (rows, block)."""
        steps = torch.arange(self.size, device=self.starts.device)
        return self.starts[:, None] + steps

    def read_prompt(self) -> None:
        """Run the clean blocks of the prompts into the cache, all in one forward."""
        width = int(self.starts.max())
        if not width:
            return
        # One forward for all: (rows, width) up to the latest start. What a row has past its own is
        # rubbish, and is written over when the row's blocks are run.
        columns = self.canvas.index[:width].expand(len(self.starts), -1)
        mask = None
        if self.options.causal_context:
            # The last key a clean query sees is itself.
            seen = columns[:1, :, None] >= columns[:1, None, :]
            mask = seen[:, None].expand(len(columns), -1, -1, -1)
        # The last clean token of a row predicts the first one of its block.
        last = torch.arange(len(columns), device=columns.device) * width + self.starts - 1
        at = last.clamp(min=0) if self.options.token_shift else last[:0]
        logits = self._run(columns, mask, at, is_prompt=True)
        self.cache.keep(int(self.starts.min()))
        if self.options.token_shift:
            self.previous = logits

    def read(
        self, columns: torch.Tensor, masked: torch.Tensor, clean: torch.Tensor
    ) -> torch.Tensor:
        """Return logits of the masked positions; rows whose block is clean go on to the next one.

        Args:
            columns: Columns of each row's block, shape (rows, block).
            masked: What is to be written there, shape (rows, block), bool.
            clean: Rows whose block is written, shape (rows,), bool.
        """
        row, place = masked.nonzero(as_tuple=True)  # each (n,), row after row
        at = row * self.size + place  # flat, in (rows * block)
        if not self.options.token_shift:
            logits = self._run(columns, self._mask(clean), at, clean)
            self._go_on(clean)
            return logits
        # Shifted, a place predicts the next one. A block's first token is predicted by the last
        # place of the block before, whose logits were kept when that block was run: `previous`.
        begins, ending = place == 0, clean.nonzero().squeeze(-1)  # (n,) bool; (clean rows,)
        # Two things of one forward: at each mask the place before it (at a block's first its own,
        # only to keep the count), and behind them the last place of each clean block, for later.
        wanted = torch.cat([at - (~begins).long(), (ending + 1) * self.size - 1])
        logits = self._run(columns, self._mask(clean), wanted, clean)
        if self.previous is None:
            self.previous = logits.new_zeros(len(_doubled(clean, self.options)), logits.shape[-1])
        # With guidance logits come twice, (2 * n, vocab): with the prompt, then without.
        found, following = [], []
        streams = 2 if self.options.guided else 1
        for part, previous in zip(logits.chunk(streams), self.previous.chunk(streams), strict=True):
            here, after = part[: len(at)], part[len(at) :]  # (n, vocab), (clean rows, vocab)
            here[begins] = previous[row[begins]]
            found.append(here)
            # (rows, vocab); rows whose block is still open keep theirs until they go on.
            following.append(previous.index_copy(0, ending, after) if len(ending) else previous)
        self.previous = following[0] if streams == 1 else torch.cat(following)
        self._go_on(clean)
        return found[0] if streams == 1 else torch.cat(found)

    def select(self, kept: torch.Tensor) -> None:
        """Keep only these rows."""
        if not len(kept):
            return
        both = _behind(kept, len(self.starts), self.options)
        self.starts = self.starts[kept]
        self.cache.batch_select_indices(both)
        # A row that was behind the others may have left: what all that stay have clean is more.
        self.cache.keep(int(self.starts.min()))
        if self.previous is not None:
            self.previous = self.previous[both]

    def read_ahead(self, columns: torch.Tensor) -> torch.Tensor | None:
        """Run blocks that are written together with those behind them: one forward, not two.

        The written block does not see the one behind it: its states are what they would be alone.

        Args:
            columns: Columns of each row's written block, shape (rows, block).

        Returns:
            Logits of the masked positions of the blocks behind; None if one of them has none.
        """
        following = columns + self.size  # (rows, block)
        masked = self.canvas.masked[self.canvas.rows[:, None], following]
        # A causal context reads the clean block otherwise than an open one: two forwards. A next
        # block without a mask (the prompt's, or past the end) has nothing to denoise.
        if self.options.causal_context or not bool(masked.any(-1).all()):
            return None
        masked = self.canvas.in_turn(following, masked)
        row, place = masked.nonzero(as_tuple=True)
        # Flat, in (rows * 2 blocks); shifted, the written block's last place predicts the first.
        at = row * 2 * self.size + self.size + place - int(self.options.token_shift)
        # Last column that each query sees, (rows, 2 blocks): the end of its own block.
        last = torch.cat(
            [columns[:, -1:].expand_as(columns), following[:, -1:].expand_as(columns)], 1
        )
        logits = self._run(torch.cat([columns, following], 1), self._seen(last), at)
        if self.options.token_shift:
            parts = logits.chunk(2) if self.options.guided else (logits,)  # (n, vocab) each
            # The clean token before a block predicts its first one in every step to come, and is
            # not run again: its logits are kept, (rows, vocab).
            first = place == 0
            kept = [part.new_zeros(len(masked), part.shape[-1]) for part in parts]
            for part, previous in zip(parts, kept, strict=True):
                previous[row[first]] = part[first]
            self.previous = torch.cat(kept)
        self._go_on(torch.ones_like(self.canvas.rows, dtype=torch.bool))
        return logits

    def _go_on(self, clean: torch.Tensor) -> None:
        self.starts = self.starts + clean.long() * self.size
        # Rows stand at different blocks: all have as much as the one furthest behind.
        self.cache.keep(int(self.starts.min()))

    def _mask(self, clean: torch.Tensor) -> torch.Tensor | None:
        # None where every query sees every column up to the end of the block, which is where the
        # keys end: no mask is built, and the attention kernel may be the one without. Rows at
        # different blocks have keys that are not theirs, and a causal context hides some.
        level = bool((self.starts == self.starts[0]).all())
        causal = self.options.causal_context and bool(clean.any())
        if self.may_be_bare and level and not causal:
            return None
        # Last column each query sees, (rows, block): the end of its block.
        last = (self.starts + self.size - 1)[:, None].expand(-1, self.size)
        if self.causal_drafts:
            return self._seen(self.columns())
        if self.options.causal_context:
            # A block that goes into the cache is read as it was trained: up to the query itself.
            last = torch.where(clean[:, None], self.columns(), last)
        return self._seen(last)

    def _seen(self, last: torch.Tensor) -> torch.Tensor:
        # A mask (rows, 1, queries, keys) from the last column (rows, queries) that each query sees.
        # Columns are positions, so a row needs no key past its last one.
        keys = torch.arange(int(last.max()) + 1, device=last.device)
        return (keys <= last[..., None])[:, None]

    def _run(
        self,
        columns: torch.Tensor,
        mask: torch.Tensor | None,
        at: torch.Tensor,
        clean: torch.Tensor | None = None,
        *,
        is_prompt: bool = False,
    ) -> torch.Tensor:
        self.cache.place(_doubled(columns, self.options))
        noisy = {}
        if self.gated and clean is not None:
            # All of an open block, (rows, block): what is written in it was noisy in training, too.
            noisy = {"noisy": (~clean)[:, None].expand(-1, self.size)}
        return _forward(
            self.model,
            self.canvas,
            columns,
            mask,
            at,
            # Nothing is unwritten in a clean block; past it, noise would cost a row draws that
            # depend on its neighbours.
            noise=not is_prompt,
            past_key_values=self.cache,
            use_cache=True,
            sees_all=mask is None and not is_prompt,
            **noisy,
        )


def _forward(
    model: Any,
    canvas: Canvas,
    columns: torch.Tensor,
    mask: torch.Tensor | None,
    at: torch.Tensor,
    *,
    noise: bool = True,
    **inputs: Any,
) -> torch.Tensor:
    """Run the active rows of a canvas once, and count it: every forward of a decoding is this one.

    With guidance the rows are run twice side by side, the second time without their prompts.

    Args:
        model: A diffusion model.
        canvas: The text so far.
        columns: Columns of it that are run, and positions of their tokens, shape (rows, n).
        mask: What they see, (rows, keys) or (rows, 1, n, keys); None is what the model makes of it.
        at: Flat places in (rows * n) whose logits are wanted, shape (wanted,).
        noise: Whether what is not written yet may be shown as noise.
        **inputs: Cache and the like.

    Returns:
        Logits, shape (wanted, vocab), with guidance (2 * wanted, vocab).
    """
    options = canvas.options
    with final_lengths(model, canvas.final_lengths):
        output = model(
            canvas.read(columns, noise=noise),
            attention_mask=None if mask is None else _doubled(mask, options),
            position_ids=_doubled(columns, options),
            logits_at=_behind(at, columns.numel(), options),
            **inputs,
        )
    canvas.forwards += 1
    logits: torch.Tensor = output.logits
    return logits


def _doubled(rows: torch.Tensor, options: DecodingOptions) -> torch.Tensor:
    """Rows and, with guidance, the same rows once more for the text without its prompt."""
    return torch.cat([rows, rows]) if options.guided else rows


def _behind(index: torch.Tensor, count: int, options: DecodingOptions) -> torch.Tensor:
    """Indices and, with guidance, those of the same things `count` further on."""
    return torch.cat([index, index + count]) if options.guided else index
