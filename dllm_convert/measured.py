"""The diffusion class of a family that was measured, not written.

It travels inside the published modelling file of such a family, so it imports torch and
transformers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modeling import DiffusionMixin, _pick


class MeasuredMixin(DiffusionMixin):
    """A stock class whose own `forward` makes the logits.

    A family nobody looked at may scale its logits or cap them, so the head is not called from here:
    the stock forward runs whole, and what is not wanted is taken away in front of the head.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Load and save under the names of the stock class, which may be known by its name only."""
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )

        super().__init_subclass__(**kwargs)
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        renamed = get_checkpoint_conversion_mapping(stock.__name__)
        if renamed is not None:
            register_checkpoint_conversion_mapping(cls.__name__, renamed, overwrite=True)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: a class with code of its own would not get its family's renamed tensors."""
        return False

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model with the attention its config claims; arguments as in `DiffusionMixin`.

        `sees_all` saves nothing here: a mask is what was measured to open every layer.

        Raises:
            ValueError: If `labels` is given, or no tokens.
        """
        if labels is not None:
            raise ValueError("this model takes no labels: its loss needs noise (dllm_convert)")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask, positions = self._open(tokens, attention_mask, position_ids, cached)
        with self._in_front_of_the_head(logits_to_keep, logits_at):
            outputs = super(DiffusionMixin, self).forward(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{name: value for name, value in kwargs.items() if name != "return_dict"},
                return_dict=True,
            )
        return CausalLMOutputWithPast(
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    @contextmanager
    def _in_front_of_the_head(
        self, keep: int | torch.Tensor, at: torch.Tensor | None
    ) -> Iterator[None]:
        """Let only the wanted positions reach the head while the block runs."""
        if at is None and isinstance(keep, int) and keep == 0:
            yield
            return

        def pick(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (_pick(args[0], keep, at), *args[1:])

        handle = self.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()
