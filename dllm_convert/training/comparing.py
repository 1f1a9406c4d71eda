"""What a forward of the student predicts, compared with text and with what its base says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.diffusion.alignment import misalignment, states_at
from dllm_convert.diffusion.distillation import Lesson
from dllm_convert.diffusion.losses import cross_entropy, taught_cross_entropy
from dllm_convert.training.counts import Counts
from dllm_convert.training.data.mask_noise import MaskNoise
from dllm_convert.training.fused_head import FusedHead
from dllm_convert.training.parts import ForwardNoise


@dataclass(frozen=True)
class Compared:
    """What one forward came to.

    Attributes:
        loss: The weighted sum, shape ().
        nats: Cross-entropies of all predictions, shape (n,).
        output: What the model returned; `logits` may be the loss.
    """

    loss: torch.Tensor
    nats: torch.Tensor
    output: Any


class Comparer:
    """Runs forwards of a student whose masked tokens are predicted, and compares.

    Where the head is the last thing that is computed the loss is made piece by piece in its place,
    so that logits of all tokens are never there together.

    Args:
        model: The student, as the Trainer holds it.
        mask_token_id: The mask, which is never predicted.
        mask_noise: Noise on the mask's embedding.
        counts: Gets what is logged beside the loss.
    """

    def __init__(
        self,
        model: Any,
        mask_token_id: int,
        mask_noise: MaskNoise,
        counts: Counts,
    ) -> None:
        self._mask_token_id = mask_token_id
        self._mask_noise, self._counts = mask_noise, counts
        self._fused = FusedHead(model, mask_token_id)

    def run(
        self,
        model: Any,
        inputs: dict[str, Any],
        targets: torch.Tensor,
        scales: torch.Tensor,
        *,
        corrupted: int,
        lesson: Lesson | None,
        noise: ForwardNoise,
    ) -> Compared:
        """Run one forward and compare.

        Args:
            model: The student as it is trained, possibly one of several processes'.
            inputs: What it is given; `logits_at` are flat places of the n predictions.
            targets: The tokens there, shape (n,).
            scales: What each one's loss is multiplied with in the sum, shape (n,), float32.
            corrupted: How many of the predictions, the first ones, are of corrupted tokens: a
                lesson is of those, and those are to be surer where they are right.
            lesson: What the base says of them, if it teaches.
            noise: What the forward is of: what its loss is made of, and where noise is drawn.
        """
        weights, sharper = noise.weights, noise.weights.sharpening(corrupted)
        # What is beside the data's loss is made piece by piece, so that it always pays.
        more = lesson is not None or sharper is not None
        if weights.alignment:
            inputs = {**inputs, "output_hidden_states": True}
        apart = unsure = None
        if self._fused.works and (more or self._fused.pays(len(targets))):
            fused = self._fused.at(targets, scales, lesson, sharper)
            with self._mask_noise.at(noise.key, noise.now), fused as found:
                output = model(**inputs)
            loss, (nats, apart, unsure) = output.logits.sum(), found
        else:
            with self._mask_noise.at(noise.key, noise.now):
                output = model(**inputs)
            if more:
                loss, nats, apart, unsure = taught_cross_entropy(
                    output.logits, targets, scales, self._mask_token_id, lesson, sharper
                )
            else:
                nats = cross_entropy(output.logits, targets, self._mask_token_id)
                loss = (nats * scales).sum()
        if lesson is not None and lesson.layers:
            away = self._misaligned(output, inputs["logits_at"], lesson, scales)
            loss = loss + weights.alignment * away
        if lesson is not None and apart is not None:
            if noise.own:
                self._counts.add(own_divergence=apart.sum(), own_taught=len(lesson))
            else:
                self._counts.add(divergence=apart.sum(), taught=len(lesson))
        if sharper is not None and unsure is not None:
            # 0 where something else was predicted.
            self._counts.add(entropy=unsure.sum(), right=(unsure > 0).sum())
        return Compared(loss, nats, output)

    def _misaligned(
        self, output: Any, places: torch.Tensor, lesson: Lesson, scales: torch.Tensor
    ) -> torch.Tensor:
        """Compare hidden states with the base's where corrupted tokens are predicted; a scalar."""
        count = len(lesson)
        apart = misalignment(states_at(output.hidden_states, places[:count]), lesson.layers)
        self._counts.add(cosine=(1 - apart.detach()).sum(), aligned=len(apart))
        return (apart * scales[:count]).sum()
