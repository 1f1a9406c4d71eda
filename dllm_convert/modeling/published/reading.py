"""Forward passes of decoding: what is run, behind which cache, and where logits are taken."""

from __future__ import annotations

from typing import Any

import torch

from .cache import BlockCache
from .canvas import Canvas
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
        row, column = masked.nonzero(as_tuple=True)
        # Flat places in (rows * n) whose logits are wanted; shifted, that of the column before.
        at = row * columns.shape[1] + column - shift - first[row]
        valid = canvas.index[:width] < canvas.ends[canvas.rows, None]
        inputs: dict[str, Any] = {"use_cache": False}
        mask: torch.Tensor | None = None if bool(valid.all()) else valid.long()
        if self.cache is not None:
            # A mask (rows, 1, n, width): the cache holds columns past a row's end, seen by nobody.
            self.cache.place(_doubled(columns, self.options), width)
            inputs = {"past_key_values": self.cache, "use_cache": True}
            mask = valid[:, None, None].expand(-1, -1, columns.shape[1], -1)
        if mask is not None:
            mask = _doubled(mask, self.options)
        with final_lengths(self.model, canvas.final_lengths):
            output = self.model(
                canvas.read(columns),
                attention_mask=mask,
                position_ids=_doubled(columns, self.options),
                logits_at=_behind(at, columns.numel(), self.options),
                **inputs,
            )
        logits: torch.Tensor = output.logits
        return logits

    def select(self, kept: torch.Tensor) -> None:
        """Keep only these rows."""
        if self.cache is not None and len(kept):
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
        # Other implementations would build a mask of their own where none is given.
        self.may_be_bare = model.config._attn_implementation == "sdpa"

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
            mask = _doubled(seen[:, None].expand(len(columns), -1, -1, -1), self.options)
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
        row, place = masked.nonzero(as_tuple=True)
        at = row * self.size + place  # flat, in (rows * block)
        if not self.options.token_shift:
            logits = self._run(columns, self._mask(clean), at)
            self._go_on(clean)
            return logits
        begins, ending = place == 0, clean.nonzero().squeeze(-1)
        # Nothing of this block predicts its first token; that place is kept free. Behind them, what
        # predicts the first token after each clean block: its last place.
        wanted = torch.cat([at - (~begins).long(), (ending + 1) * self.size - 1])
        logits = self._run(columns, self._mask(clean), wanted)
        if self.previous is None:
            self.previous = logits.new_zeros(len(_doubled(clean, self.options)), logits.shape[-1])
        # With guidance logits come twice, (2 * n, vocab): with the prompt, then without.
        found, following = [], []
        streams = 2 if self.options.guided else 1
        for part, previous in zip(logits.chunk(streams), self.previous.chunk(streams), strict=True):
            here, after = part[: len(at)], part[len(at) :]
            # A block's first token is predicted from the clean token before it.
            here[begins] = previous[row[begins]]
            found.append(here)
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
        following = columns + self.size
        masked = self.canvas.masked[self.canvas.rows[:, None], following]
        if self.options.causal_context or not bool(masked.any(-1).all()):
            return None
        row, place = masked.nonzero(as_tuple=True)
        # Flat, in (rows * 2 blocks); shifted, the written block's last place predicts the first.
        at = row * 2 * self.size + self.size + place - int(self.options.token_shift)
        # Last column that each query sees, (rows, 2 blocks): the end of its own block.
        last = torch.cat(
            [columns[:, -1:].expand_as(columns), following[:, -1:].expand_as(columns)], 1
        )
        logits = self._run(torch.cat([columns, following], 1), self._seen(last), at)
        if self.options.token_shift:
            parts = logits.chunk(2) if self.options.guided else (logits,)
            # First tokens are not written yet in these blocks: later steps read them from here.
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
        # None where every query sees every column up to the end of the block.
        level = bool((self.starts == self.starts[0]).all())
        causal = self.options.causal_context and bool(clean.any())
        if self.may_be_bare and level and not causal:
            return None
        last = (self.starts + self.size - 1)[:, None].expand(-1, self.size)
        if self.options.causal_context:
            last = torch.where(clean[:, None], self.columns(), last)
        return self._seen(last)

    def _seen(self, last: torch.Tensor) -> torch.Tensor:
        # A mask (rows, 1, queries, keys) from the last column that each query sees.
        keys = torch.arange(int(last.max()) + 1, device=last.device)
        return _doubled((keys <= last[..., None])[:, None], self.options)

    def _run(
        self,
        columns: torch.Tensor,
        mask: torch.Tensor | None,
        at: torch.Tensor,
        *,
        is_prompt: bool = False,
    ) -> torch.Tensor:
        both = _doubled(columns, self.options)
        self.cache.place(both)
        with final_lengths(self.model, self.canvas.final_lengths):
            output = self.model(
                self.canvas.read(columns, noise=not is_prompt),
                attention_mask=mask,
                position_ids=both,
                past_key_values=self.cache,
                use_cache=True,
                logits_at=_behind(at, columns.numel(), self.options),
                sees_all=mask is None and not is_prompt,
            )
        self.canvas.forwards += 1
        logits: torch.Tensor = output.logits
        return logits


def _doubled(rows: torch.Tensor, options: DecodingOptions) -> torch.Tensor:
    """Rows and, with guidance, the same rows once more for the text without its prompt."""
    return torch.cat([rows, rows]) if options.guided else rows


def _behind(index: torch.Tensor, count: int, options: DecodingOptions) -> torch.Tensor:
    """Indices and, with guidance, those of the same things `count` further on."""
    return torch.cat([index, index + count]) if options.guided else index
