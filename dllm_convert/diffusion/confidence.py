"""Confidence where a prediction is right already.

A cross-entropy hardly asks a prediction that is right to be surer, and what is decoded in parallel
is what the model is sure of. Confidence-aware training (LLaDA2, arXiv 2512.15745) adds the entropy
of the predicted distribution at those masked tokens whose likeliest word is the right one:

    cross-entropy + weight * [argmax p = x] * H(p)

LLaDA2 reports 1.46 times the tokens per forward for 1.7 (100B) to 2.8 (16B) points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LEAST = -100.0
"""Least log-probability that counts, in nats: that of the mask is -inf, and 0 times it is none."""


@dataclass(frozen=True)
class Sharpening:
    """How much entropy counts, and of which rows.

    Attributes:
        weight: What the entropy is multiplied with, above 0.
        rows: The first rows of a loss have it: corrupted tokens, not those of a clean stream.
    """

    weight: float
    rows: int

    def add(
        self, logs: torch.Tensor, gradient: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Add the entropy's gradient to that of a cross-entropy.

        Args:
            logs: Log-probabilities of the words, (rows, vocab), float32, the mask's -inf; they are
                overwritten.
            gradient: With respect to the logits, (rows, vocab); becomes that of the whole.
            targets: The right words, shape (rows,).

        Returns:
            The entropy in nats where the likeliest word is the right one, elsewhere 0; (rows,).
        """
        right = logs.argmax(-1) == targets
        logs = logs.clamp_(min=_LEAST)
        chances = logs.exp()
        entropy: torch.Tensor = -(chances * logs).sum(-1) * right
        # dH / d logit = -p (log p + H); which word is likeliest has no gradient.
        slope = chances.mul_(logs.add_(entropy[:, None])).mul_(right[:, None])
        gradient.sub_(slope, alpha=self.weight)
        return entropy
