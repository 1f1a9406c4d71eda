"""What a training is told beside text and objective, and what a forward of it is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch

from dllm_convert.common.terms import Kernel
from dllm_convert.diffusion.confidence import Sharpening
from dllm_convert.diffusion.corruption import Corruption, NoiseKey
from dllm_convert.diffusion.distillation import Distillation, Lesson
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.training.growth import BlockGrowth


@dataclass(frozen=True)
class LossWeights:
    """What the optimised loss is made of.

    Attributes:
        masked: `elbo`: a scored token weighs what it weighs in the NELBO; `uniform`: 1.
        auxiliary: Weight of the cross-entropy of a corrupted token beside the bound (D3PM, arXiv
            2107.03006, equation 5).
        ar: Weight of a next-token loss on the clean stream (bd3lm with causal context only).
        distillation: What is learnt from the base beside the data; None for nothing.
        alignment: Weight of what hidden states are apart from the base's.
        confidence: Weight of the entropy of corrupted tokens that are predicted right already.
    """

    masked: Literal["elbo", "uniform"] = "elbo"
    ar: float = 0.0
    distillation: Distillation | None = None
    confidence: float = 0.0
    alignment: float = 0.0
    auxiliary: float = 0.0

    @property
    def asks_base(self) -> bool:
        """Whether the loss has a part that the base decides."""
        lesson = self.distillation
        return lesson is not None and (lesson.weight > 0 or self.alignment > 0)

    def weighed(self, weight: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        """Return what each corrupted token weighs; (n,), of `weight`, (n,), as in the bound.

        Where tokens are masked their loss is a cross-entropy, so that D3PM's other one adds to its
        weight; the uniform kernel's is a divergence, and its cross-entropy is added apart.
        """
        if self.masked == "uniform":
            return torch.ones_like(weight)
        return weight + self.auxiliary if kernel == "absorbing" else weight

    def sharpening(self, rows: int) -> Sharpening | None:
        """Return what is to be surer, of so many corrupted tokens; None for nothing."""
        return Sharpening(self.confidence, rows) if self.confidence else None

    def of(self, lesson: Lesson) -> Lesson:
        """Return what a base says, as much of it as is learnt."""
        return lesson if self.distillation is None else replace(lesson, how=self.distillation)

    @property
    def on_policy(self) -> LossWeights:
        """What the loss is made of where the model wrote the text itself.

        Of its own words nothing is learnt, whatever they are: only what the base says there.
        """
        lesson = self.distillation
        if lesson is None:
            raise ValueError("what a model writes itself is learnt from a base")
        return LossWeights(
            self.masked, distillation=replace(lesson, weight=1.0), alignment=self.alignment
        )


@dataclass(frozen=True)
class Annealing:
    """What fades over the first steps of a training.

    Attributes:
        attention_steps: Steps over which a causal attention is opened (DiffuLLaMA, arXiv
            2410.17891).
        mask_noise_std: Noise on the mask's embedding, in units of the embedding's own standard
            deviation (LLaDA2, arXiv 2512.15745).
        mask_noise_steps: Steps over which that noise fades.
        blocks: How blocks grow to their size (bd3lm); None for blocks that have it.
        planned: Steps of the whole training, of which a time limit keeps these the same share; None
            to leave them as long as they are.
    """

    attention_steps: int = 0
    mask_noise_std: float = 0.0
    mask_noise_steps: int = 0
    blocks: BlockGrowth | None = None
    planned: int | None = None


@dataclass(frozen=True)
class ForwardNoise:
    """Text and noise of one forward, on the CPU, and what its loss is divided by.

    Attributes:
        objective: What is learnt in its step.
        weights: What its loss is made of.
        batch: Clean text.
        views: Draws of noise over its text.
        closed: Pairs of positions that attention annealing keeps closed; None for none.
        key: Where the noise was drawn.
        now: Its step, as one of the plan.
        scored: Scorable tokens of this forward, over all views.
        own: Whether the model wrote the text itself, of which there is no bound.
        items: Positions the optimised loss is a mean over, of all forwards and processes of the
            step, so that a token weighs the same in whichever of them it is. Known, as `texts`
            is, when all of the step are drawn.
        texts: Scorable tokens of all forwards and processes of the step.
    """

    objective: Objective
    weights: LossWeights
    batch: TextBatch
    views: tuple[Corruption, ...]
    closed: torch.Tensor | None
    key: NoiseKey
    now: Fraction
    scored: int
    own: bool
    items: float = 1.0
    texts: float = 1.0
