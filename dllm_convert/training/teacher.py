"""Ask a base what it would have written: the lesson of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from dllm_convert.diffusion.alignment import states_at
from dllm_convert.diffusion.distillation import Distillation, Lesson
from dllm_convert.diffusion.gated import CleanReading
from dllm_convert.training.fused_head import head_weights, in_place_of, last_head

_AT_ONCE = 1 << 25
"""Entries of logits that are made at once where their head is about to go."""


class Teacher:
    """Has the base predict what a student predicts, from clean text and without a gradient.

    The base is the student with its adapter switched off, or a frozen copy beside it. Hidden states
    are kept, and logits are made of them where the student's are: there is no tensor of tokens
    times vocabulary. Of a model that is sharded over processes the head is whole only while it
    runs; there the logits are kept, or with `top_k` those that count.

    Args:
        student: The model that is trained.
        how: What is learnt.
        mask_token_id: The mask.
        copy: Frozen base in evaluation mode, on the device; None where the student holds it.
        sharded: Whether the student's weights are shared by several processes.
        aligns: Whether its hidden states are learnt from, too.
    """

    def __init__(
        self,
        student: Any,
        how: Distillation,
        mask_token_id: int,
        *,
        copy: Any = None,
        sharded: bool = False,
        aligns: bool = False,
    ) -> None:
        self._student, self._copy, self._how = student, copy, how
        self._mask_token_id = mask_token_id
        self._sharded = sharded and copy is None
        self.aligns = aligns
        self._head = last_head(student if copy is None else copy)

    def teach(self, model: Any, reading: CleanReading, mask: Any) -> Lesson:
        """Run the base over clean text for nothing but its predictions.

        Args:
            model: The student as it is trained, possibly one of several processes'.
            reading: What it reads, on the device.
            mask: Who sees whom, as its attention takes it.
        """
        model = model if self._copy is None else self._copy
        with self._base_only(model):
            settings = {"use_cache": False, "output_hidden_states": self.aligns}
            _, lesson = self.ask(
                lambda: model(**reading.inputs, attention_mask=mask, **settings),
                reading.inputs["logits_at"],
                0,
            )
        return lesson

    @contextmanager
    def _base_only(self, model: Any) -> Iterator[None]:
        training = model.training
        peft = isinstance(self._student, PeftModel) and self._copy is None
        # PEFT says anew which weights are trained, of those that it finds: the gathered ones where
        # FSDP2 has put them in the place of its shards, which it then takes back.
        trained = [(weight, weight.requires_grad) for weight in self._student.parameters()]
        model.eval()
        try:
            with self._student.disable_adapter() if peft else nullcontext():
                yield
        finally:
            for weight, learns in trained:
                weight.requires_grad_(learns)
            model.train(training)

    @torch.no_grad()
    def ask(
        self, run: Callable[[], Any], places: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, Lesson]:
        """Run a forward of the base; its logits at the first places, and the lesson of the others.

        Args:
            run: The forward; its output has logits, (first + n, vocab), and hidden states if
                those are learnt from.
            places: Flat places that the logits are of, (first + n,).
            first: Places whose logits are asked for.
        """
        output, logits, lesson = self._asked(run, first)
        if self.aligns:
            lesson = replace(lesson, layers=states_at(output.hidden_states, places[first:]))
        return logits, lesson

    def _asked(self, run: Callable[[], Any], first: int) -> tuple[Any, torch.Tensor, Lesson]:
        if self._head is None or _own_weights(self._head) is None:
            output = run()
            return output, output.logits[:first], self._kept(output.logits[first:])
        found: list[Lesson] = []

        def predict(hidden: torch.Tensor) -> torch.Tensor:
            matrix, bias = _own_weights(self._head) or (hidden, None)
            compute, device = hidden.dtype, hidden.device.type
            if torch.is_autocast_enabled(device):
                compute = torch.get_autocast_dtype(device)
            hidden, matrix = hidden.to(compute), matrix.to(compute)
            whole = Lesson(self._how, hidden, matrix, None if bias is None else bias.to(compute))
            size = max(1, _AT_ONCE // len(matrix))
            rows = range(first, len(hidden), size)
            if self._sharded and len(rows):
                parts = [self._kept(whole.of(slice(at, at + size)).states) for at in rows]
                words = [part.words for part in parts if part.words is not None]
                found.append(
                    Lesson(
                        self._how,
                        torch.cat([part.states for part in parts]),
                        words=torch.cat(words) if words else None,
                    )
                )
            else:
                found.append(Lesson(self._how, hidden[first:], matrix, whole.bias))
            return whole.of(slice(0, first)).states

        with in_place_of(self._head, predict):
            output = run()
        return output, output.logits, found[0]

    def _kept(self, logits: torch.Tensor) -> Lesson:
        return Lesson(self._how, logits).most(self._mask_token_id)


def _own_weights(head: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return matrix and biases of the base's head, whatever is trained over it."""
    if isinstance(head, ModulesToSaveWrapper):
        return head_weights(head.original_module)
    if isinstance(head, TrainableTokensWrapper):
        return head_weights(head.token_adapter.get_base_layer())
    return head_weights(head)
