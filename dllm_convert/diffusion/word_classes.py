"""MD4's generalised schedule: how fast a token is masked depends on what it is (GenMD4).

alpha_v(t) = 1 - t^{w_v}, with an exponent of each word's class (arXiv 2406.04329, section 6). A
word of a large exponent is masked late, and so opened early. In the reverse a mask opens into word
k at rate w_k mu_k / t, of the model's prediction mu, and into the true word v at rate w_v / t; the
bound is their divergence, integrated over t in (0, 1]:

    E_t [ 1/t sum_{i masked} ( sum_k w_k mu_k - w_v - w_v log mu_v ) ].

With one exponent the first two terms cancel, and MDLM's bound is left.

The exponents are learnt with the model. They are in the terms, and in which tokens are masked: of
that there is no derivative through a sample, and the paper takes REINFORCE leave-one-out over two
draws a and b at the same t. What shares a t sees no other's noise, so it is taken group by group:

    1/2 (f_a - f_b) (d log q(a) - d log q(b)) + 1/2 (d f_a + d f_b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dllm_convert.diffusion.device import row_pieces
from dllm_convert.modeling.published.choosing import forbid
from dllm_convert.modeling.published.noising import class_of_word


@dataclass(frozen=True)
class WordClasses:
    """Which words share an exponent, and those exponents.

    Attributes:
        exponents: w of each class.
        members: Ids of the words of all classes but the last, which has the others.
        rows: Rows of the embedding, V.
    """

    exponents: tuple[float, ...]
    members: tuple[tuple[int, ...], ...]
    rows: int

    @cached_property
    def of_word(self) -> torch.Tensor:
        """Number of each word's class, shape (V,)."""
        return class_of_word(self.members, self.rows)

    @cached_property
    def weights(self) -> torch.Tensor:
        """Exponents, shape (classes,), float64."""
        return torch.tensor(self.exponents, dtype=torch.float64)

    def masked_share(self, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Probability t^w that tokens are masked at times `t`, each of one shape; float64."""
        return t.double() ** self.weights[self.of_word[tokens]]


def classes_by_frequency(
    counts: torch.Tensor, classes: int, mask: int
) -> tuple[tuple[int, ...], ...]:
    """Share words out into classes that a text has equally often, the frequent ones first.

    So each exponent learns from as many tokens; the last class has most of the vocabulary.

    Args:
        counts: How often each word is in the text, shape (V,).
        classes: How many.
        mask: Id that is no word.

    Returns:
        Words of all classes but the last; fewer classes where the text has not as many words.
    """
    counts = counts.clone().double()
    counts[mask : mask + 1] = 0
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    if not len(order):
        return ()
    # The share of the text before each word says its class: of two words none is in both.
    before = counts[order].cumsum(0) - counts[order]
    number = (before / counts.sum() * classes).long().clamp(max=classes - 1)
    found = [order[number == one].sort().values for one in range(classes - 1)]
    return tuple(tuple(words.tolist()) for words in found if len(words))


def class_divergence(
    logits: torch.Tensor, targets: torch.Tensor, classes: WordClasses, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a masked token costs where it is weighted with 1/t, and how that depends on exponents.

    Args:
        logits: Predictions, shape (n, vocab).
        targets: Clean tokens v, shape (n,).
        classes: The exponents.
        mask_token_id: Token that is never predicted.

    Returns:
        sum_k w_k mu_k - w_v - w_v log mu_v in nats, shape (n,), and, without a gradient, its
        derivatives by the exponents, shape (n, classes); both float32.
    """
    function: Any = _ClassDivergence
    nats, by_exponents = function.apply(logits, targets, classes, mask_token_id)
    return nats, by_exponents


class _ClassDivergence(torch.autograd.Function):
    """The divergence some rows at a time, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        classes: WordClasses,
        mask_token_id: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = logits.device
        own = classes.of_word.to(device)
        weights = classes.weights.float().to(device)
        each = weights[own]  # (V,)
        nats = torch.empty(len(logits), dtype=torch.float32, device=device)
        by_exponents = torch.zeros(len(logits), len(weights), device=device)
        gradients = torch.empty_like(logits)
        for rows in row_pieces(logits, cpu=1 << 22, other=1 << 26):
            scores = logits[rows].to(torch.float32, copy=True)
            forbid(scores, mask_token_id)
            log = scores.log_softmax(-1)
            guess = log.exp()
            at = targets[rows, None]
            said = log.gather(-1, at).squeeze(-1)  # log mu_v
            mean = guess @ each
            true = each[targets[rows]]
            nats[rows] = mean - true - true * said
            here = by_exponents[rows]
            here.index_add_(-1, own, guess)
            here.scatter_add_(-1, own[at], -(1 + said)[:, None])
            # d mean / d logit_j = mu_j (w_j - mean); d log mu_v = [j = v] - mu_j.
            slope = guess * (each - mean[:, None] + true[:, None])
            slope.scatter_add_(-1, at, -true[:, None])
            gradients[rows] = slope.to(logits.dtype)
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(by_exponents)
        return nats, by_exponents

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * gradient[:, None].to(gradients.dtype), None, None, None


@dataclass(frozen=True)
class ClassDraw:
    """Two draws at the same times, and what was scored of them; all on the CPU.

    Attributes:
        tokens: Clean tokens, shape (batch, length).
        groups: What shares a time, numbered over the batch, shape (batch, length).
        scorable: Tokens that may be masked, shape (batch, length), bool.
        time: t of each token, shape (batch, length), float64.
        masked: What the two draws mask, each of shape (batch, length), bool.
    """

    tokens: torch.Tensor
    groups: torch.Tensor
    scorable: torch.Tensor
    time: torch.Tensor
    masked: tuple[torch.Tensor, torch.Tensor]


def exponent_gradient(
    draw: ClassDraw,
    classes: WordClasses,
    nats: Sequence[torch.Tensor],
    by_exponents: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Estimate the derivative of the sum of both draws' losses by the exponents, without bias.

    Args:
        draw: The draws.
        classes: The exponents.
        nats: Of each draw the terms of its masked tokens, in the order of `nonzero`, shape (n,).
        by_exponents: Of each draw their derivatives, shape (n, classes).

    Returns:
        Shape (classes,), float64.
    """
    count = len(classes.exponents)
    total = torch.zeros(count, dtype=torch.float64)
    groups = int(draw.groups.max()) + 1 if draw.groups.numel() else 0
    own = classes.of_word[draw.tokens]
    log_t = draw.time.log()
    share = classes.masked_share(draw.time, draw.tokens)
    # d log q of a token that is masked, log t, and of one that is not.
    kept = -share * log_t / (1 - share).clamp(min=torch.finfo(torch.float64).tiny)
    losses, scores = [], []
    for masked, terms, slopes in zip(draw.masked, nats, by_exponents, strict=True):
        weight = 1 / draw.time[masked]
        total += (slopes.double() * weight[:, None]).sum(0)
        loss = torch.zeros(groups, dtype=torch.float64)
        losses.append(loss.index_add_(0, draw.groups[masked], terms.double() * weight))
        score = torch.where(masked, log_t, kept)[draw.scorable]
        place = draw.groups[draw.scorable] * count + own[draw.scorable]
        flat = torch.zeros(groups * count, dtype=torch.float64)
        scores.append(flat.index_add_(0, place, score).view(groups, count))
    # Of the sum of both draws: twice what the estimator has for one.
    return total + (losses[0] - losses[1]) @ (scores[0] - scores[1])
