"""Diffusion classes: stock transformers models, opened, with denoising in `generate`.

One mixin and one line per family. The same classes train, sample and verify.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    BertForMaskedLM,
    GenerationMixin,
    LlamaForCausalLM,
    MistralForCausalLM,
    ModernBertForMaskedLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    RobertaForMaskedLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .behind import CacheBlockReader, check_last, stands_behind_cache
from .decoding import decode_blocks, decode_canvas
from .gated import GatedMixin, gated_mask, has_causal_drafts
from .inputs import given_prompts, left_open
from .limits import check_context
from .lockstep import decode_queued, is_queued
from .lossless import check_lossless, check_prompts, decode_lossless
from .masks import block_causal_mask, see_self
from .options import DecodingOptions, Observer
from .output import DiffusionOutput, put_together
from .paired import check_paired, decode_paired
from .rope import own_lengths
from .settings import decoding_options
from .streaming import StreamerFeed

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
            "attention_mask": self._by_layer(mask, positions),
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
            logits=self._logits_of(hidden),
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _by_layer(self, mask: Any, positions: torch.Tensor) -> Any:
        """The mask as the stock class takes it, of tokens at positions (batch, length)."""
        return mask

    def _logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = getattr(self, self._head)(hidden)
        return logits

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
        causal = has_causal_drafts(self.config)
        if noisy is None:
            # Where nobody sees ahead, a block is a token.
            mask = block_causal_mask(every, valid, 1 if causal else block_size, length)
        else:
            # What is cached is clean.
            cached_ones = noisy.new_zeros(batch, every.shape[1] - length)
            among = torch.cat([cached_ones, noisy.expand(batch, -1)], dim=1)
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
            **kwargs: Any field of `DecodingOptions` (`verify_with` may be a model, too, such as the
                base: its text is written, and this one drafts), and what transformers' `generate`
                takes (`stop_strings` with `tokenizer`, `stopping_criteria`, `logits_processor`,
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
        verifier = kwargs.get("verify_with")
        if isinstance(verifier, torch.nn.Module):
            kwargs["verify_with"] = None
        else:
            verifier = None
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
        decode = self._decoding(options, verifier, packed, told, with_order=output_order)
        if streamer is not None:
            first = packed[:, : told[0] if rows else 0]
            observer = streamer = StreamerFeed(streamer, first, options, observer)
        decoded = decode(self, packed, lengths, options, observer)
        if streamer is not None:
            streamer.finish(decoded)
        output = put_together(prompts, mask, order, decoded, with_order=output_order)
        return output if return_dict_in_generate else output["sequences"]

    def _decoding(
        self,
        options: DecodingOptions,
        verifier: Any,
        packed: torch.Tensor,
        told: list[int],
        *,
        with_order: bool,
    ) -> Any:
        """Choose what decodes right-padded prompts (rows, width), `told` tokens long."""
        decode: Any = decode_blocks if options.block_size else decode_canvas
        if verifier is not None:
            check_paired(self, verifier, options)
            check_prompts(packed, told, options)
            return partial(decode_paired, verifier=verifier)
        if options.verify_with:
            check_lossless(self, packed, told, options)
            return decode_lossless
        if stands_behind_cache(self.config):
            return partial(decode, reader=CacheBlockReader)
        if told and is_queued(packed.device, options):
            record = self.record_graphs
            return partial(decode_queued, told=told, with_order=with_order, record=record)
        return decode if self.reader is None else partial(decode, reader=self.reader)


class DiffusionLlamaForCausalLM(DiffusionMixin, LlamaForCausalLM):
    """Llama as a diffusion language model."""


class DiffusionMistralForCausalLM(DiffusionMixin, MistralForCausalLM):
    """Mistral as a diffusion language model."""


class DiffusionQwen2ForCausalLM(DiffusionMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 as a diffusion language model."""


class DiffusionQwen3ForCausalLM(DiffusionMixin, Qwen3ForCausalLM):
    """Qwen3 as a diffusion language model."""


class DiffusionModernBertForMaskedLM(DiffusionMixin, GenerationMixin, ModernBertForMaskedLM):
    """ModernBERT as a diffusion language model; its local layers keep their window."""

    def _by_layer(self, mask: Any, positions: torch.Tensor) -> Any:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return mask
        # Of a 4-D mask the stock class makes no window; (batch, 1, length, length).
        far = (positions[:, :, None] - positions[:, None, :]).abs() > self.config.sliding_window
        shut = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        local = mask.masked_fill(far[:, None], shut)
        return {"full_attention": mask, "sliding_attention": local}

    def _logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder(self.head(hidden))
        return logits


class DiffusionBertForMaskedLM(DiffusionMixin, GenerationMixin, BertForMaskedLM):
    """BERT as a diffusion language model."""

    _head = "cls"


class DiffusionRobertaForMaskedLM(DiffusionMixin, GenerationMixin, RobertaForMaskedLM):
    """RoBERTa as a diffusion language model."""

    @property
    def _first_position(self) -> int:
        # Rows of RoBERTa's position table up to and including the padding id belong to padding.
        return int(self.config.pad_token_id or 0) + 1
