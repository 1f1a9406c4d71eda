"""The diffusion class of a family that was measured, not written."""

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

    # A mask is what was measured to open every layer: `sees_all` saves nothing here.
    _goes_without_mask = False

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

    def _run_model(
        self, arguments: dict[str, Any], keep: int | torch.Tensor, at: torch.Tensor | None
    ) -> CausalLMOutputWithPast:
        """Run the stock forward, head included, on what `DiffusionMixin.forward` prepared."""
        with self._in_front_of_the_head(keep, at):
            outputs = super(DiffusionMixin, self).forward(**arguments, return_dict=True)
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
