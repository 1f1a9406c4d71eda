"""Train beside a base that stays: its keys and values of clean text are what noisy tokens read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from dllm_convert.diffusion.distillation import Lesson
from dllm_convert.diffusion.gated import CleanReading
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import Objective
from dllm_convert.modeling.gated_files import write_adapter_weights
from dllm_convert.modeling.published.gated import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    PREFIX,
    adapter_parameters,
    fill_adapter,
)
from dllm_convert.training.gated_linear import fuse_adapters
from dllm_convert.training.masters import keep_masters
from dllm_convert.training.teacher import Teacher


class CleanStates(Cache):
    """Keys and values of clean text, which noisy tokens read and add nothing to.

    A layer that is computed again in the backward pass reads the same as before.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._filled = False

    def close(self) -> None:
        """Say that all clean text is read."""
        self._filled = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values that a layer attends to, (batch, heads, read + new, width)."""
        if not self._filled:
            self._states[layer_idx] = key_states, value_states
            return key_states, value_states
        keys, values = self._states[layer_idx]
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


@torch.no_grad()
def read_clean(
    model: Any,
    reading: CleanReading,
    mask: Any,
    objective: Objective,
    teacher: Teacher | None = None,
) -> tuple[CleanStates, torch.Tensor, Lesson | None]:
    """Run the base over clean text.

    Args:
        model: A gated model, as it is trained; possibly one of several processes'.
        reading: What it reads, on the device.
        mask: Who sees whom, as its attention takes it.
        objective: What is learnt.
        teacher: Has it predict what the adapter learns, too; None for no such lesson.

    Returns:
        Its keys and values, its cross-entropy of the first tokens of blocks in nats, (m,), and the
        lesson.
    """
    states, training = CleanStates(), model.training

    def run() -> Any:
        return model(
            **reading.inputs,
            attention_mask=mask,
            past_key_values=states,
            use_cache=False,
            output_hidden_states=teacher is not None and teacher.aligns,
        )

    model.eval()
    try:
        logits, lesson = (
            (run().logits, None)
            if teacher is None
            else teacher.ask(run, reading.inputs["logits_at"], len(reading.targets))
        )
    finally:
        model.train(training)
    states.close()
    return states, cross_entropy(logits, reading.targets, objective.mask_token_id), lesson


def train_adapter(model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """Have only the adapter of a gated model be trained, in float32 and as its files say.

    Args:
        model: A gated model.
        folder: The checkpoint it was loaded from.
        dtype: Type that matrices are multiplied in under autocast; None without.
    """
    trained = adapter_parameters(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trained)
    keep_masters(model)
    # What was loaded in the type of the base may have been rounded.
    fill_adapter(model, load_file(folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS))
    fuse_adapters(model, dtype)
    return model


def save_states(model: Any, folder: Path) -> None:
    """Write the adapter's tensors into a folder, and nothing of the base."""
    states = adapter_parameters(model)
    write_adapter_weights(folder, {PREFIX + name: weight for name, weight in states.items()})


def load_states(model: Any, folder: Path) -> None:
    """Read what `save_states` wrote."""
    fill_adapter(model, load_file(folder / ADAPTER_WEIGHTS))


def may_checkpoint(model: Any) -> bool:
    """Let layers that are computed again read clean states; whether this transformers lets them."""
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    known = hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache")
    if known:
        # Clean states are read and never added to, so that a second reading is the same.
        for layer in layers:
            layer._can_checkpoint_with_cache = True
    return known


def gated_again(
    model: Any, contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Have a layer be computed again with the gate as it is now.

    Args:
        model: A gated model.
        contexts: Of the forward and of what is computed again.
    """
    first, again = contexts
    return first, _both(again, model.gate.again())


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
