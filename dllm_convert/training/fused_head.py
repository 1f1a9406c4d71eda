"""The head of a model, computed together with its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper

from dllm_convert.diffusion.confidence import Sharpening
from dllm_convert.diffusion.distillation import Lesson
from dllm_convert.diffusion.losses import linear_cross_entropy
from dllm_convert.modeling.published.modeling import DiffusionMixin


class FusedHead:
    """Has a model return its weighted loss where it would return logits.

    Logits are most of a training's memory where the vocabulary is large: of 4 x 1024 tokens and
    152,000 words they and what Accelerate and the loss make of them are 10 bytes per scored token
    and word. Computed in place of the head, inside the model's own forward, the loss works under
    DDP, FSDP and ZeRO as the head does.

    Args:
        model: A diffusion model of this package, with adapters or without.
        mask_token_id: The mask, which is never predicted.
    """

    def __init__(self, model: Any, mask_token_id: int) -> None:
        self._mask_token_id = mask_token_id
        head = last_head(model)
        self._head = None if head_weights(head) is None else head

    @property
    def works(self) -> bool:
        """Whether the head is a plain projection, and the last thing that is computed."""
        return self._head is not None

    def pays(self, count: int) -> bool:
        """Whether it takes less memory than the logits of `count` tokens.

        The gradient of the head's matrix is there before the backward pass begins; logits and what
        is made of them are 10 bytes for each token and word, 4 on a CPU, whose loss is made in
        pieces anyway.
        """
        weight, _ = head_weights(self._head) or (None, None)
        if weight is None or not weight.requires_grad:
            return True
        return count * (4 if weight.device.type == "cpu" else 10) >= 4 * weight.shape[-1]

    @contextmanager
    def at(
        self,
        targets: torch.Tensor,
        scale: torch.Tensor,
        lesson: Lesson | None = None,
        sharper: Sharpening | None = None,
    ) -> Iterator[list[torch.Tensor]]:
        """Compute the loss in place of the logits while the block runs.

        Args:
            targets: Token at each place whose logits are asked for, shape (n,).
            scale: What its loss is multiplied with, shape (n,), float32.
            lesson: What a teacher says of the first of them.
            sharper: Which of them are to be surer where they are right.

        Yields:
            A list that holds, after the forward, what `linear_cross_entropy` returns beside the
            loss, each (n,). The model's `logits` are the weighted sum, shape (1,).
        """
        found: list[torch.Tensor] = []

        def loss_of(hidden: torch.Tensor) -> torch.Tensor:
            weights = head_weights(self._head)
            if weights is None:
                raise RuntimeError("the head is no projection any more")
            loss, *parts = linear_cross_entropy(
                hidden, *weights, targets, scale, self._mask_token_id, lesson, sharper
            )
            found.extend(parts)
            return loss.reshape(1)

        with in_place_of(self._head, loss_of):
            yield found


def last_head(model: Any) -> Any:
    """Return the head of a model, with adapters or without; None if more may follow it."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # A class that was measured, not declared, may do something to its logits.
    own = getattr(type(inner), "_run_model", None) is DiffusionMixin._run_model
    return inner.get_output_embeddings() if own else None


@contextmanager
def in_place_of(head: Any, compute: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Have a head compute something else while the block runs.

    Args:
        head: A module.
        compute: Given hidden states; returns what the model has for logits.
    """
    # Over the class's own, so that hooks of whoever shards the model still run.
    head.forward = compute
    try:
        yield
    finally:
        del head.forward


def head_weights(head: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return matrix and biases of a projection as they are now; None if it is none."""
    # FSDP derives a class of its own from Linear; so do layers whose weights are packed in 4 bits,
    # which are no floats. PEFT's tied heads have their two sizes the wrong way round.
    if isinstance(head, torch.nn.Linear) and head.weight.is_floating_point():
        return head.weight, head.bias
    if isinstance(head, ModulesToSaveWrapper) and not head.disable_adapters:
        return head_weights(head.modules_to_save[head.active_adapters[0]])
    return None
