"""Forward passes of a decoding on a GPU: whole texts, or one block of every row."""

from __future__ import annotations

from typing import Any

import torch

from .cache import BlockCache
from .canvas import Canvas
from .gated import has_causal_drafts
from .graphs import Graphs
from .moving import sent
from .options import Decoded, DecodingOptions, Observer
from .queued import QueuedDecoder
from .rope import depends_on_length

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
        canvas.tokens.view(-1)[self.flat] = self.block
        if self.options.noise_tokens:
            canvas.masked.view(-1)[self.flat] = self.block == self.unwritten


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
        self.written = torch.zeros_like(self.block)  # the tokens of the block before
        self.pair = torch.cat([self.behind, self.columns], 1)  # the columns of both
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
        if number and self.regions[number].starts == self.regions[number - 1].starts:
            # Another part of the same block, of which nothing is clean yet.
            self.enter(number)
            self.ahead = False
            self._see("open", self.columns, causal=self.causal_drafts)
            return
        fused = bool(self.steps[number]) and not self.options.causal_context
        if number:
            if not fused:
                # Nothing to denoise, or read otherwise than denoised: the block alone.
                self._see("clean", self.columns, causal=self.options.causal_context)
                self.run("clean", self._run_clean, self.visible)
            self.written.copy_(self.block)
        self.enter(number)
        self.ahead = fused and number > 0
        if self.ahead:
            torch.cat([self.behind, self.columns], 1, out=self.pair)
            self._see("ahead", self.pair)
        self._see("open", self.columns, causal=self.causal_drafts)

    def _see(self, name: str, columns: torch.Tensor, *, causal: bool = False) -> None:
        """Make the mask of a forward over columns (rows, queries): up to the end of a block."""
        n, region = self.columns_at_hand, self.regions[self.region]
        if name == "clean":
            region = self.regions[self.region - 1]
        self.visible = self._bucket(max(region.starts) + n, self.graphs.wanted)
        bare = self.may_be_bare and not causal and name != "ahead" and not self.graphs.wanted
        if bare and len(set(region.starts)) == 1:
            self.masks.pop(name, None)
            return
        rows, queries = columns.shape
        # The last key that each query sees, (rows, blocks, n or 1, 1).
        last = columns.view(rows, -1, n)[..., None]
        last = last if causal else last[:, :, -1:]
        both = rows * 2 if self.options.guided else rows
        shape = both, 1, queries, self.visible
        held = self.masks.get(name)
        if held is None or held.shape != shape:
            held = self.masks[name] = torch.empty(shape, dtype=torch.bool, device=self.device)
        seen = held.view(-1, rows, queries // n, n, self.visible)
        torch.le(self.keys[: self.visible], last.expand((*seen.shape[:-1], 1)), out=seen)

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
        columns = self.pair
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
        both = super().select(places)
        kept = both[: self.rows]
        self.written, self.pair = self.written[kept], self.pair[kept]
        self.cache.batch_select_indices(both)
        self.line = self._line()
        self.masks.clear()
        self._see("open", self.columns, causal=self.causal_drafts)
        return both


def is_queued(device: torch.device, options: DecodingOptions) -> bool:
    """Whether a decoding is queued: not on a CPU, with kept states, by rules or a sampler.

    Rules are asked on the host, with the text as it is; a sampler draws there what comes next.
    """
    asks = options.approximate_cache or options.rules.is_set or options.sampler is not None
    return device.type != "cpu" and not asks


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
