"""Learning from a base: its distribution of a token beside the token itself.

The base predicts a token from those before it, p_T(x_i | x_<i), in one forward over clean text. At
a noisy position the student's prediction is drawn towards that (Hinton et al., arXiv 1503.02531;
for diffusion students OPDLM 2606.06712, TIDE 2604.26951). The base sees all that stands to the
left, also what is masked for the student, and nothing to the right, so that its distribution is
mixed with the data's own loss and does not replace it:

    (1 - weight) * cross-entropy + weight * temperature^2 * D(p_T, p_S)

Both distributions are softened by the temperature; the mask is in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dllm_convert.common.terms import Divergence
from dllm_convert.modeling.published.choosing import forbid

_LEAST = -100.0
"""Least log-probability that counts, in nats. That of the mask is -inf for both, as it is for rows
without a word in some models; and 0 times infinity is no number."""


@dataclass(frozen=True)
class Distillation:
    """How much is learnt from a teacher, and how.

    Attributes:
        weight: Share of the divergence in the loss, from 0 (only hidden states are compared) to 1.
        divergence: `forward_kl` KL(p_T || p_S), `reverse_kl` KL(p_S || p_T), or `total_variation`,
            half of the sum of differences: the share of tokens that speculative sampling rejects.
        temperature: What logits of both are divided by.
        top_k: Words of the teacher's that count, renormalised; None for all.
    """

    weight: float
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True)
class Lesson:
    """What a teacher predicts at n places; logits are made of it some rows at a time.

    Attributes:
        how: What is learnt from it.
        states: Its hidden states before the head, (n, width); without a `matrix` its logits,
            (n, vocab), or those of `words`, (n, k).
        matrix: Its head, (vocab, width).
        bias: Of the head, (vocab,).
        words: Token ids that its logits are of, (n, k); None for the whole vocabulary.
        layers: Its hidden states after every layer, each (n, width); none where nobody compares.
    """

    how: Distillation
    states: torch.Tensor
    matrix: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    words: torch.Tensor | None = None
    layers: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.states)

    def at(self, rows: torch.Tensor) -> Lesson:
        """Return the lesson of some places, in any order; rows (k,), of the n."""
        words = None if self.words is None else self.words[rows]
        layers = tuple(layer[rows] for layer in self.layers)
        return replace(self, states=self.states[rows], words=words, layers=layers)

    @classmethod
    def joined(cls, parts: Sequence[Lesson]) -> Lesson:
        """Return lessons that one base gave, one behind the other, as one."""
        words = [part.words for part in parts if part.words is not None]
        return replace(
            parts[0],
            states=torch.cat([part.states for part in parts]),
            words=torch.cat(words) if words else None,
            layers=tuple(
                torch.cat(of_layer)
                for of_layer in zip(*(part.layers for part in parts), strict=True)
            ),
        )

    def of(self, rows: slice) -> Lesson:
        """Return the lesson of some rows, whose logits are there."""
        logits = self.states[rows]
        if self.matrix is not None:
            logits = torch.nn.functional.linear(logits, self.matrix, self.bias)
        words = None if self.words is None else self.words[rows]
        return replace(self, states=logits, matrix=None, bias=None, words=words)

    def most(self, mask_token_id: int) -> Lesson:
        """Return a lesson of logits with those that count, if not all do."""
        count = self.how.top_k
        if count is None or self.words is not None or count >= self.states.shape[-1]:
            return self
        scores = self.states.clone()
        forbid(scores, mask_token_id)
        values, words = scores.topk(count, dim=-1)
        return replace(self, states=values, words=words)

    def _probabilities(self, rows: slice, like: torch.Tensor, mask_token_id: int) -> torch.Tensor:
        """Return p_T of some rows, softened, shape of `like`: (rows, vocab), float32."""
        chosen = self.of(rows).most(mask_token_id)
        scores = chosen.states.to(torch.float32, copy=True)
        if chosen.words is not None:
            chances = (scores / self.how.temperature).softmax(-1)
            return torch.zeros_like(like).scatter_(-1, chosen.words, chances)
        forbid(scores, mask_token_id)
        return scores.div_(self.how.temperature).softmax(-1)

    def mix(
        self, scores: torch.Tensor, gradient: torch.Tensor, rows: slice, mask_token_id: int
    ) -> torch.Tensor:
        """Mix what the teacher says into the gradient of a cross-entropy.

        Args:
            scores: The student's logits, (rows, vocab), float32, the mask's -inf; not changed.
            gradient: Of their cross-entropy, (rows, vocab); becomes that of the mixed loss.
            rows: Which of the n places.
            mask_token_id: The mask.

        Returns:
            The divergence at each of them in nats, (rows,), times the temperature squared.
        """
        how = self.how
        given = self._probabilities(rows, scores, mask_token_id)  # p_T, (rows, vocab)
        logs = (scores / how.temperature).log_softmax(-1)  # log p_S
        own = logs.exp()
        logs.clamp_(min=_LEAST)
        if how.divergence == "forward_kl":
            apart = (torch.special.xlogy(given, given) - given * logs).sum(-1)
            slope = own - given
        elif how.divergence == "reverse_kl":
            ratio = logs - given.log().clamp_(min=_LEAST)
            apart = (own * ratio).sum(-1)
            slope = own * (ratio - apart[:, None])
        else:
            difference = own - given
            apart = difference.abs().sum(-1) / 2
            sign = difference.sign() / 2
            slope = own * (sign - (own * sign).sum(-1, keepdim=True))
        gradient.mul_(1 - how.weight).add_(slope, alpha=how.weight * how.temperature)
        nats: torch.Tensor = apart * how.temperature**2
        return nats
