"""Diffusion language model classes, written by dllm-convert 0.1.0.

Needs torch and transformers >= 5.2.0 only. Load with `trust_remote_code=True`, which runs
the other `*_dllm.py`, too; without it the same weights load as the stock class, whose masks and
denoising are then the caller's business.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    BertForMaskedLM,
    GenerationMixin,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    RobertaForMaskedLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from .behind_dllm import CacheBlockReader, check_last, stands_behind_cache
from .decoding_dllm import (
    BlockCache,
    Canvas,
    StreamerFeed,
    final_lengths,
    given_prompts,
    left_open,
    own_lengths,
)
from .device_dllm import decode_queued, is_queued
from .gated_dllm import GatedMixin, gated_mask, has_causal_drafts
from .lossless_dllm import check_lossless, decode_lossless
from .settings_dllm import Decoded, DecodingOptions, Observer, decoding_options

# Diffusion classes: stock transformers models, opened, with denoising in `generate`.
#
# One mixin and one line per family. The same classes train, sample and verify.


MIN_TRANSFORMERS = "5.2.0"

if Version(transformers.__version__) < Version(MIN_TRANSFORMERS):
    raise ImportError(
        f"transformers {transformers.__version__} would load this diffusion model with causal "
        f"attention and no warning; it needs at least {MIN_TRANSFORMERS}: "
        f"pip install 'transformers>={MIN_TRANSFORMERS}'"
    )


def _pick(hidden: torch.Tensor, keep: int | torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """Keep the hidden states (batch, length, hidden) whose logits are wanted."""
    if at is not None:
        return hidden.flatten(0, 1)[at]
    if isinstance(keep, torch.Tensor):
        return hidden[:, keep]
    return hidden[:, -keep:] if keep else hidden


class DiffusionMixin(GatedMixin):
    """Opened attention, logits where they are needed, and decoding by denoising.

    What the checkpoint is stands in the config: `is_causal: false`, `mask_token_id`, `block_size`
    (BD3LM only) and the `diffusion` section. Where that says `acts_on: noisy` the model is gated:
    causal, the base itself, but for tokens that `forward` is told are noisy.

    Attributes:
        record_graphs: Whether decoding on a CUDA device may record its steps as graphs.
        graph_replays: How many steps of the last decoding were replayed from a graph.
        reader: What runs the forwards of a decoding where that is other code than this model's:
            makes, of the model and the text, what has the methods of `BlockReader`, or without
            blocks of `CanvasReader`.
    """

    record_graphs = True
    graph_replays = 0
    reader: Any = None
    _head = "lm_head"
    _goes_without_mask = True

    @property
    def _first_position(self) -> int:
        return 0

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        logits_at: torch.LongTensor | None = None,
        sees_all: bool = False,
        noisy: torch.BoolTensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model with the attention its config claims.

        Args:
            input_ids: Tokens, shape (batch, length).
            attention_mask: Padding mask, shape (batch, cached + length), 1 at tokens; or a 4-D mask
                (batch, 1, length, cached + length), True where a query may look, used as it is.
            position_ids: Positions counted from 0 in each text, shape (batch, length). By default
                they are counted over the padding mask, so padding on either side changes nothing.
            past_key_values: Cache of clean tokens.
            inputs_embeds: Embeddings instead of `input_ids`, shape (batch, length, hidden).
            labels: Not accepted: a diffusion loss needs noise, see `dllm_convert.diffusion`.
            use_cache: Whether to fill `past_key_values`.
            logits_to_keep: Keep the last n positions, or the positions a 1-D tensor names.
            logits_at: Flat indices into (batch * length), shape (n,): logits only there, shape
                (n, vocab). The loss needs masked positions only; the rest is most of the memory.
            sees_all: Every query sees every key, those in the cache included, and no mask is built:
                one block behind clean ones.
            noisy: Of a gated model: where the adapter acts, and the mask vector stands for the
                mask, shape (batch, length); without a 4-D mask such tokens see their block. None is
                nowhere: the base, bit for bit.
            **kwargs: Passed to the base model.

        Returns:
            Logits, shape (batch, length, vocab), and the cache.

        Raises:
            ValueError: If `labels` is given, or `noisy` where there is no gate.
        """
        if labels is not None:
            raise ValueError("this model takes no labels: its loss needs noise (dllm_convert)")
        if noisy is not None and self.gate is None:
            raise ValueError("noisy is for a gated model that was loaded with its adapter")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask: Any = None
        positions: torch.Tensor
        if sees_all and self._goes_without_mask and position_ids is not None:
            positions = position_ids
        else:
            mask, positions = self._open(tokens, attention_mask, position_ids, cached, noisy)
        places: torch.Tensor | None = (
            positions + first if (first := self._first_position) else positions
        )
        if attention_mask is None and position_ids is None and stands_behind_cache(self.config):
            # The stock class counts on from its cache, by whatever it takes for positions.
            places = None
        arguments = {name: value for name, value in kwargs.items() if name != "return_dict"} | {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": places,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if self.gate is None:
            with own_lengths(self, positions):
                return self._run_model(arguments, logits_to_keep, logits_at)
        with own_lengths(self, positions), self.gate.at(input_ids, noisy) as ids:
            return self._run_model({**arguments, "input_ids": ids}, logits_to_keep, logits_at)

    def _run_model(
        self, arguments: dict[str, Any], keep: int | torch.Tensor, at: torch.Tensor | None
    ) -> CausalLMOutputWithPast:
        """Run the stock model on what `forward` prepared; logits where `_pick` says."""
        # Whatever config.json says of tuples: what follows reads names.
        outputs = self.base_model(**arguments, return_dict=True)
        hidden = _pick(outputs.last_hidden_state, keep, at)
        return CausalLMOutputWithPast(
            logits=getattr(self, self._head)(hidden),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _open(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cached: int,
        noisy: torch.Tensor | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """Return the mask as the attention implementation takes it, and positions."""
        batch, length = tokens.shape[:2]
        is_full = attention_mask is not None and len(attention_mask.shape) == 4
        behind_cache = stands_behind_cache(self.config)
        if behind_cache and is_full:
            raise ValueError("this family's attention stays as it is: it takes no 4-D mask")
        if behind_cache and noisy is not None:
            check_last(noisy)
        if is_full and position_ids is not None:
            return self._in_form(attention_mask), position_ids
        counted = torch.arange(cached + length, device=tokens.device).expand(batch, -1)
        if is_full:
            return self._in_form(attention_mask), counted[:, cached:]
        if attention_mask is None:
            every = counted if position_ids is None or cached else position_ids.expand(batch, -1)
        else:
            every = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        positions = every[:, -length:] if position_ids is None else position_ids.expand(batch, -1)
        block_size = getattr(self.config, "block_size", None)
        if not block_size or behind_cache or (self.is_gated and noisy is None):
            return attention_mask, positions
        valid = (torch.ones_like(every) if attention_mask is None else attention_mask).bool()
        if noisy is None:
            mask = block_causal_mask(every, valid, block_size, length)
        else:
            # What is cached is clean.
            cached_ones = noisy.new_zeros(batch, every.shape[1] - length)
            among = torch.cat([cached_ones, noisy.expand(batch, -1)], dim=1)
            causal = has_causal_drafts(self.config)
            mask = see_self(
                gated_mask(every, valid, among, block_size, length, causal_drafts=causal)
            )
        return self._in_form(mask), positions

    def _in_form(self, mask: Any) -> Any:
        """Turn a boolean mask (batch, 1, q, k) into what eager or flex attention reads."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            return mask
        implementation = self.config._attn_implementation
        if implementation == "eager":
            closed = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
            return closed.masked_fill_(~mask, torch.finfo(self.dtype).min)
        if implementation == "flex_attention":
            batch, _, queries, keys = mask.shape
            rule, device = lambda b, _, q, k: mask[b, 0, q, k], str(mask.device)
            return create_block_mask(rule, batch, None, queries, keys, device=device)
        # Whoever has its masks made as sdpa does reads any boolean one.
        if ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is not sdpa_mask:
            raise ValueError(
                f"{implementation} takes no arbitrary mask; load this model with "
                'attn_implementation="sdpa", "eager" or "flex_attention"'
            )
        return mask

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: Any | None = None,
        *,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        return_dict_in_generate: bool | None = None,
        output_order: bool = False,
        observer: Observer | None = None,
        streamer: Any | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | DiffusionOutput:
        """Write text by denoising.

        Args:
            inputs: Prompts, shape (batch, length), padded on either side as `attention_mask` says;
                masks in them are written too. What the tokenizer puts behind every text does not
                count as part of a prompt: it stays where it is, and nothing sees it.
            generation_config: Settings that come before the checkpoint's generation_config.json;
                what is not set in it, or None, is left to that file.
            input_ids: The same as `inputs`.
            attention_mask: 1 at tokens, shape (batch, length).
            token_type_ids: Taken for the sake of tokenizers that give them; 0 at every token.
            seed: Makes drawing reproducible: row r draws from `seed + r`, or from its own in a
                list.
            return_dict_in_generate: Return a `DiffusionOutput` instead of the sequences.
            output_order: Return in it when each token was committed.
            observer: Called with a `Progress` after the prompt and after every denoising forward.
            streamer: A streamer of transformers, for one prompt: gets text that is final from left
                to right, and drafts if it takes them (`TextDiffusionStreamer`).
            **kwargs: Any field of `DecodingOptions`, and what transformers' `generate` takes
                (`stop_strings` with `tokenizer`, `stopping_criteria`, `logits_processor`,
                `repetition_penalty`, ...), for this call only. What denoising cannot do, such as
                `num_beams`, is refused with the reason.

        Returns:
            The prompts as given, each `num_return_sequences` times, then new tokens; after a row's
            end comes padding. Shape (batch, length + max_new_tokens).

        Raises:
            ValueError: A setting is unknown, a prompt empty, or a text longer than its positions.
        """
        prompts, mask = given_prompts(inputs, input_ids, attention_mask, token_type_ids)
        given, own, (rows, width) = generation_config, self.generation_config, prompts.shape
        options = decoding_options(
            *(self.config, own, rows, seed, kwargs),
            given=given,
            width=width,
            device=prompts.device,
        )
        if (copies := options.num_return_sequences) > 1:
            prompts, mask = (part.repeat_interleave(copies, 0) for part in (prompts, mask))
        if return_dict_in_generate is None:
            return_dict_in_generate = getattr(given, "return_dict_in_generate", None)
        mask = left_open(prompts, mask, getattr(own, "closing_token_ids", None))
        lengths = mask.sum(-1)
        order = mask.argsort(dim=-1, descending=True, stable=True)
        packed = prompts.gather(1, order)
        begins_masked = (packed[:, :1] == options.mask_token_id).any(-1)
        # Once to the host: (rows,) each.
        told, masked = torch.stack([lengths, begins_masked.to(lengths.dtype)]).tolist()
        check_context(self, told, options.max_new_tokens, options.block_size)
        if options.token_shift and (0 in told or any(masked)):
            raise ValueError(
                "this model predicts a token from the one before: give at least one token, "
                "and no mask in its place"
            )
        decode: Any = decode_blocks if options.block_size else decode_canvas
        if options.verify_with:
            check_lossless(self, packed, lengths, options)
            decode = decode_lossless
        elif stands_behind_cache(self.config):
            decode = partial(decode, reader=CacheBlockReader)
        elif rows and is_queued(prompts.device, options):
            record = self.record_graphs
            decode = partial(decode_queued, told=told, with_order=output_order, record=record)
        elif self.reader is not None:
            decode = partial(decode, reader=self.reader)
        if streamer is not None:
            first = packed[:, : told[0] if rows else 0]
            observer = streamer = StreamerFeed(streamer, first, options, observer)
        decoded = decode(self, packed, lengths, options, observer)
        if streamer is not None:
            streamer.finish(decoded)
        output = put_together(prompts, mask, order, decoded, with_order=output_order)
        return output if return_dict_in_generate else output["sequences"]


class DiffusionLlamaForCausalLM(DiffusionMixin, LlamaForCausalLM):
    """Llama as a diffusion language model."""


class DiffusionMistralForCausalLM(DiffusionMixin, MistralForCausalLM):
    """Mistral as a diffusion language model."""


class DiffusionQwen2ForCausalLM(DiffusionMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 as a diffusion language model."""


class DiffusionQwen3ForCausalLM(DiffusionMixin, Qwen3ForCausalLM):
    """Qwen3 as a diffusion language model."""


class DiffusionBertForMaskedLM(DiffusionMixin, GenerationMixin, BertForMaskedLM):
    """BERT as a diffusion language model."""

    _head = "cls"


class DiffusionRobertaForMaskedLM(DiffusionMixin, GenerationMixin, RobertaForMaskedLM):
    """RoBERTa as a diffusion language model."""

    @property
    def _first_position(self) -> int:
        # Rows of RoBERTa's position table up to and including the padding id belong to padding.
        return int(self.config.pad_token_id or 0) + 1


# The mask of a converted model: causal across blocks, open inside one.


def see_self(mask: torch.Tensor) -> torch.Tensor:
    """Let each query of a mask (batch, queries, keys) see itself too; (batch, 1, queries, keys)."""
    # A padded query that sees nothing turns a softmax into NaN; seeing itself is harmless, since
    # nobody looks at it.
    queries, keys = mask.shape[-2:]
    own = torch.arange(queries, device=mask.device) + (keys - queries)
    diagonal = own[:, None] == torch.arange(keys, device=mask.device)[None, :]
    return (mask | diagonal).unsqueeze(1)


def block_causal_mask(
    positions: torch.Tensor, valid: torch.Tensor, block_size: int, queries: int
) -> torch.Tensor:
    """Causal across blocks, bidirectional inside a block.

    Args:
        positions: Position of each key in its text, counted from 0, shape (batch, keys), int.
        valid: False at padding, shape (batch, keys), bool.
        block_size: Tokens per block.
        queries: The last `queries` keys are also the queries.

    Returns:
        Boolean mask, shape (batch, 1, queries, keys).
    """
    block = positions // block_size
    return see_self((block[:, -queries:, None] >= block[:, None, :]) & valid[:, None, :])


# How long a text may be: what a model has positions for, and what it was trained on.


_BESIDE = 4
"""Rows that a table of positions may have beside those of its context, as RoBERTa's and OPT's."""


class ContextError(ValueError):
    """A text is longer than the table of learnt positions: there is nothing to look up."""


class ContextWarning(UserWarning):
    """A text is longer than the context: rotary positions go on, where nothing was trained."""


def context_of(model: Any) -> int | None:
    """Return the longest text in tokens that a model's config names, None if it names none."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - int(getattr(model, "_first_position", 0))


def has_position_table(model: Any) -> bool:
    """Whether positions are looked up in a table as long as the context, as an encoder's are."""
    positions, words = int(model.config.max_position_embeddings), model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not words
        and 0 <= module.num_embeddings - positions <= _BESIDE
        for module in model.modules()
    )


def check_context(model: Any, lengths: list[int], new: int, block_size: int | None) -> None:
    """Look whether the longest prompt and the new tokens, in whole blocks, fit into the context.

    Raises a ContextError if not and positions are looked up in a table; else it warns.
    """
    longest = max(lengths, default=0)
    context, total = context_of(model), longest + new
    blocks = -(-total // block_size) * block_size if block_size else total
    if context is None or blocks <= context:
        return
    told = f"a prompt of {longest} tokens and {new} new ones are {total}"
    if has_position_table(model):
        whole = f", {blocks} in whole blocks of {block_size}" if blocks > total else ""
        raise ContextError(
            f"{told}{whole}, and this model has positions for {context}: shorten the prompt, or "
            "write fewer tokens"
        )
    if total > context:
        warnings.warn(
            f"{told}, more than the context of {context} this model was trained on",
            ContextWarning,
            stacklevel=4,
        )


# Decoding by denoising: MDLM over a canvas, BD3LM block by block with one KV cache.


def decode_canvas(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
    *,
    reader: Any = None,
) -> Decoded:
    """MDLM decoding (LLaDA, arXiv 2502.09992): all new positions start masked and are filled in.

    Prompts (batch, width) are right-padded, `lengths` (batch,) counts their tokens; masks in them
    are filled in as well. Rows that are done leave the batch. `reader` makes what runs the
    forwards, of the model and the canvas; by default a `CanvasReader`.
    """
    limits = lengths + options.max_new_tokens
    canvas = Canvas(prompts, lengths, options, limits=limits, observer=observer)
    reader = (reader or CanvasReader)(model, canvas)
    # The window each row was in last, (batch,); none yet, so that every row begins one.
    window = torch.full_like(lengths, -(2**31))
    canvas.show()
    while len(canvas.rows):
        # As wide as the longest text still written: rows that left make the others cheaper.
        width = int(canvas.ends[canvas.rows].max())
        columns = canvas.index[:width].expand(len(canvas.rows), -1)
        masked = canvas.wanted(columns)
        if options.block_length:
            # Windows are counted from each row's first new token, masks in a prompt lie in negative
            # ones: the number of every column, (rows, width), and the first with a mask, (rows,).
            number = (canvas.index[:width] - lengths[canvas.rows, None]) // options.block_length
            current = number.masked_fill(~masked, 2**31).amin(-1)
            if options.approximate_cache:
                # In step, so that no row's states are older or newer than they would be alone.
                current = current.amin().expand_as(current)
            masked = masked & (number == current[:, None])
        else:
            current = torch.zeros_like(canvas.rows)
        # A row that enters a window, or begins at all, counts its steps anew.
        beginning = window[canvas.rows] != current
        window[canvas.rows] = current
        canvas.begin(masked, beginning)
        logits = reader.read(masked, current, bool(beginning.any()))
        canvas.denoise(logits, columns, masked)
        canvas.show()
        # Nothing is settled before all is written: remasking may take any token back.
        done = canvas.finished(torch.zeros_like(beginning))
        if done.any():
            reader.select(canvas.leave(done))
    return canvas.result()


def decode_blocks(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
    *,
    reader: Any = None,
) -> Decoded:
    """BD3LM decoding (arXiv 2503.09573): block after block, clean blocks in one KV cache.

    Blocks are counted from position 0 of each prompt. The prompt's unfinished tail sits, clean, in
    the first decoded block; a prompt with masks is decoded from its first masked block on. Every
    row is at a block of its own: in one forward some are denoised and others, whose block is
    written, extend the cache; where all are written, the forward that extends the cache denoises
    the next blocks as well. Arguments are those of `decode_canvas`; `reader` makes a `BlockReader`,
    of the block size too.
    """
    size = options.block_size or 1
    # Whole blocks: behind its last new token a row has masks, which nothing is written into.
    limits = (lengths + options.max_new_tokens + size - 1) // size * size
    canvas = Canvas(prompts, lengths, options, limits=limits, observer=observer)
    reader = (reader or BlockReader)(model, canvas, size)
    reader.read_prompt()
    canvas.show()
    # Rows whose block is new to them, (rows,): their steps are counted from here.
    beginning = torch.ones_like(canvas.rows, dtype=torch.bool)
    while len(canvas.rows):
        columns = reader.columns()  # of the block each row is at, (rows, block)
        masked = canvas.wanted(columns)
        is_open = masked.any(-1)  # (rows,)
        logits = None
        if not is_open.any():
            logits = reader.read_ahead(columns)
        if logits is not None:
            # The written blocks are in the cache, and every row stands at the next one.
            columns = reader.columns()
            masked = canvas.wanted(columns)
            is_open = beginning = torch.ones_like(is_open)
        canvas.begin(masked, beginning)
        if logits is None:
            # Open blocks are denoised beside written ones, which go into the cache.
            logits = reader.read(columns, masked, ~is_open)
        if len(logits):  # none where every block was written and went into the cache
            canvas.denoise(logits, columns, masked)
            canvas.show()
        beginning = ~is_open
        # What remasking left in a block that is now written, nothing takes back, (rows,).
        settled = ~canvas.masked[canvas.rows[:, None], columns].any(-1)
        done = canvas.finished(settled)
        if done.any():
            kept = canvas.leave(done)
            reader.select(kept)
            beginning = beginning[kept]
    return canvas.result()


# Forward passes of decoding: what is run, behind which cache, and where logits are taken.


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
        self.may_be_bare = model.config._attn_implementation == "sdpa" and not self.gated

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


# What `generate` returns.


@dataclass
class DiffusionOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: Prompt and new tokens, shape (batch, prompt + max_new_tokens).
        forwards: Forward passes run.
        tokens_per_forward: New tokens divided by forwards and rows.
        order: Where it was asked for: the forward, counted from 1, in which each token of
            `sequences` was committed; 0 at tokens that were given and at padding.
        new_tokens: New tokens of each row, its end-of-text token included, padding not, shape
            (batch,).
        close: Of lossless decoding: tokens that stood so near another one's logit that a forward of
            a single token may have rounded otherwise.
    """

    sequences: torch.Tensor | None = None
    forwards: int | None = None
    tokens_per_forward: float | None = None
    order: torch.Tensor | None = None
    new_tokens: torch.Tensor | None = None
    close: int | None = None


def put_together(
    prompts: torch.Tensor,
    mask: torch.Tensor,
    order: torch.Tensor,
    decoded: Decoded,
    *,
    with_order: bool,
) -> DiffusionOutput:
    """Put what was decoded behind, and into, the prompts (batch, length) as they were given.

    `mask` is 1 at their tokens; `order` is the column each of `decoded.prompts` came from.
    """
    given, places = mask.bool(), order[:, : decoded.prompts.shape[1]]
    filled = torch.where(given, prompts.scatter(1, places, decoded.prompts), prompts)
    earlier = torch.zeros_like(prompts).scatter(1, places, decoded.prompt_order) * given
    per_row = int(decoded.new.sum()) / max(len(prompts), 1)
    return DiffusionOutput(
        sequences=torch.cat([filled, decoded.rows], dim=1),
        forwards=decoded.forwards,
        tokens_per_forward=per_row / max(decoded.forwards, 1),
        order=torch.cat([earlier, decoded.order], dim=1) if with_order else None,
        new_tokens=decoded.new,
        close=decoded.close,
    )
