"""What a prediction costs, in nats: cross-entropy, and D3PM's bound for the uniform kernel."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dllm_convert.diffusion.confidence import Sharpening
from dllm_convert.diffusion.device import rows_at_once
from dllm_convert.diffusion.distillation import Lesson
from dllm_convert.modeling.published.choosing import forbid


def _without_mask(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    # In place, if it is float32 already, and unseen by autograd: another copy of the logits or of
    # their gradient is as large as all of a small model. The gradient there is zero by itself.
    scores = logits.float()
    with torch.no_grad():
        forbid(scores, mask_token_id)
    return scores


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy some rows at a time, with only the logits kept for the gradient.

    torch's own keeps the probabilities in float32 and makes two more tensors of their size in the
    backward pass: of half-precision logits seven times what they take, and most of a training's
    memory where the vocabulary is large and the model small.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, mask_token_id: int
    ) -> torch.Tensor:
        total = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        nats, size = torch.empty_like(total), rows_at_once(logits)
        pieces = (torch.split(part, size) for part in (logits, targets, total, nats))
        for rows, target, sums, out in zip(*pieces, strict=True):
            scores = rows.to(torch.float32, copy=True)
            forbid(scores, mask_token_id)
            torch.logsumexp(scores, dim=-1, out=sums)
            torch.sub(sums, scores.gather(-1, target[:, None]).squeeze(-1), out=out)
        ctx.save_for_backward(logits, targets, total)
        ctx.mask_token_id = mask_token_id
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, total = ctx.saved_tensors
        result, size = torch.empty_like(logits), rows_at_once(logits)
        pieces = (part.split(size) for part in (logits, result, targets, total, gradients[0]))
        for rows, out, target, sums, gradient in zip(*pieces, strict=True):
            scores = rows.to(torch.float32, copy=True).sub_(sums[:, None]).exp_()
            scores[:, ctx.mask_token_id : ctx.mask_token_id + 1] = 0
            scores.scatter_add_(-1, target[:, None], scores.new_full((len(target), 1), -1.0))
            out.copy_(scores.mul_(gradient[:, None]))
        return result, None, None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Cross-entropy in nats, shape (n,), of logits (n, vocab) that can never predict the mask."""
    function: Any = _CrossEntropy
    nats: torch.Tensor = function.apply(logits, targets, mask_token_id)
    return nats


class _LinearCrossEntropy(torch.autograd.Function):
    """A projection and its cross-entropy, some rows at a time; gradients come with the loss.

    Of each piece of rows the logits live until their gradient is multiplied out: there is never a
    tensor of tokens times vocabulary, and no product is computed twice. That takes a loss which is
    linear in the cross-entropies, with factors that are known beforehand (as Liger does it, arXiv
    2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: torch.Tensor,
        mask_token_id: int,
        lesson: Lesson | None,
        sharper: Sharpening | None,
    ) -> tuple[torch.Tensor, ...]:
        device = hidden.device.type
        compute = hidden.dtype
        if torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        states, matrix = hidden.to(compute), weight.to(compute)
        shift = None if bias is None else bias.to(compute)
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        found = nats, torch.zeros_like(nats), torch.zeros_like(nats)
        for_hidden = torch.empty_like(hidden)
        for_weight: torch.Tensor | None = None
        learnt = bias is not None and bias.requires_grad
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if learnt else None  # type: ignore[arg-type]
        size = _rows_of_products(weight)
        with torch.autocast(device, enabled=False):
            for rows in _pieces(len(hidden), size, lesson, sharper):
                # (rows, vocab): logits, and in their place the gradient of each.
                logits = torch.nn.functional.linear(states[rows], matrix, shift)
                _to_gradients(logits, targets, scale, found, rows, mask_token_id, (lesson, sharper))
                for_hidden[rows] = logits @ matrix
                if weight.requires_grad:
                    product = logits.T @ states[rows]
                    # Of one piece there is nothing to add up.
                    for_weight = product.float() if for_weight is None else for_weight.add_(product)
                if for_bias is not None:
                    for_bias += logits.sum(0, dtype=torch.float32)
        if weight.requires_grad and for_weight is None:
            for_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.found = (for_hidden, for_weight, for_bias)
        ctx.types = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(*found)
        return (_mixed(*found, lesson, sharper) * scale).sum(), *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        for_hidden, for_weight, for_bias = ctx.found
        # Whoever takes the only reference need not copy: of a large vocabulary that is a matrix.
        ctx.found = None
        # Asking a GPU whether there is anything to multiply with would have the host wait.
        if gradient.device.type != "cpu" or gradient != 1:
            for part in (for_hidden, for_weight, for_bias):
                if part is not None:
                    part.mul_(gradient)
        of_weight, of_bias = ctx.types
        return (
            for_hidden,
            None if for_weight is None else for_weight.to(of_weight),
            None if for_bias is None else for_bias.to(of_bias),
            None,
            None,
            None,
            None,
            None,
        )


class _TaughtCrossEntropy(torch.autograd.Function):
    """The loss of logits that were computed; their gradient comes with it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        scale: torch.Tensor,
        mask_token_id: int,
        lesson: Lesson | None,
        sharper: Sharpening | None,
    ) -> tuple[torch.Tensor, ...]:
        nats = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        found = nats, torch.zeros_like(nats), torch.zeros_like(nats)
        gradients = logits.detach().clone()
        for rows in _pieces(len(logits), len(logits) or 1, lesson, sharper):
            _to_gradients(
                gradients[rows], targets, scale, found, rows, mask_token_id, (lesson, sharper)
            )
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(*found)
        return (_mixed(*found, lesson, sharper) * scale).sum(), *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * gradient, None, None, None, None, None


def _pieces(
    total: int, size: int, lesson: Lesson | None, sharper: Sharpening | None
) -> Iterator[slice]:
    """Cut rows into pieces; those of a lesson, or to be sharper, come first, and fill pieces."""
    ends = {0, total, 0 if lesson is None else len(lesson)}
    if sharper is not None:
        ends.add(min(sharper.rows, total))
    for begin, end in pairwise(sorted(ends)):
        for first in range(begin, end, size):
            yield slice(first, min(first + size, end))


def _mixed(
    nats: torch.Tensor,
    apart: torch.Tensor,
    unsure: torch.Tensor,
    lesson: Lesson | None,
    sharper: Sharpening | None,
) -> torch.Tensor:
    """Return the loss of each row: its cross-entropy, a lesson's share, and what it is unsure."""
    loss = nats
    if lesson is not None:
        weight = torch.zeros_like(nats)
        weight[: len(lesson)] = lesson.how.weight
        loss = nats * (1 - weight) + apart * weight
    return loss if sharper is None else loss + sharper.weight * unsure


def _rows_of_products(weight: torch.Tensor) -> int:
    """Rows whose logits are there at once: enough to keep the device busy with products."""
    entries = 1 << 25 if weight.device.type == "cpu" else 1 << 27
    return max(1, entries // len(weight))


def _to_gradients(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows: slice,
    mask_token_id: int,
    beside: tuple[Lesson | None, Sharpening | None],
) -> None:
    """Write cross-entropies and what a loss has beside them, and over the logits its gradients.

    Args:
        logits: Of some rows, (rows, vocab).
        targets: Of all rows, as everything that follows, (n,).
        scale: What is multiplied with the loss of a row.
        found: Cross-entropies, divergences from a lesson, entropies of what is right: written.
        rows: Which rows.
        mask_token_id: The mask.
        beside: A teacher's lesson, and what is to be surer; of all these rows, or of none.
    """
    (nats, apart, unsure), (lesson, sharper) = found, beside
    sharper = sharper if sharper is not None and rows.start < sharper.rows else None
    # Logits of all these rows in one product, as the student's are.
    taught = lesson.of(rows) if lesson is not None and rows.start < len(lesson) else None
    size = rows_at_once(logits)
    for first in range(0, len(logits), size):
        inside = slice(first, min(first + size, len(logits)))
        piece, at = logits[inside], slice(rows.start + inside.start, rows.start + inside.stop)
        target = targets[at, None]
        scores = piece.float()
        forbid(scores, mask_token_id)
        sums = torch.logsumexp(scores, dim=-1)
        nats[at] = sums - scores.gather(-1, target).squeeze(-1)
        # d nats / d logits is the softmax, less one at the target; 0 at the mask.
        kept = taught is not None or sharper is not None
        gradient = (scores - sums[:, None] if kept else scores.sub_(sums[:, None])).exp_()
        gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0))
        if taught is not None:
            apart[at] = taught.mix(scores, gradient, inside, mask_token_id)
        if sharper is not None:
            unsure[at] = sharper.add(scores.sub_(sums[:, None]), gradient, target.squeeze(-1))
        piece.copy_(gradient.mul_(scale[at, None]))


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: torch.Tensor,
    mask_token_id: int,
    lesson: Lesson | None = None,
    sharper: Sharpening | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of a projection that can never predict the mask.

    Args:
        hidden: Hidden states, shape (n, width).
        weight: The projection, shape (vocab, width).
        bias: Shape (vocab,), or None.
        targets: Shape (n,).
        scale: What each cross-entropy is multiplied with in the sum, shape (n,), float32.
        mask_token_id: The mask.
        lesson: What a teacher says of the first of them.
        sharper: Which of them are to be surer where they are right.

    Returns:
        The weighted sum, shape (), and, without a gradient, the cross-entropies in nats, the
        divergences from the lesson (0 behind it), and the entropies of what is right and is to be
        surer (0 elsewhere), each (n,), float32.
    """
    function: Any = _LinearCrossEntropy
    loss, nats, apart, unsure = function.apply(
        hidden, weight, bias, targets, scale, mask_token_id, lesson, sharper
    )
    return loss, nats, apart, unsure


def taught_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    mask_token_id: int,
    lesson: Lesson | None = None,
    sharper: Sharpening | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted loss of logits, shape (n, vocab), beside a cross-entropy's; as that of a head."""
    function: Any = _TaughtCrossEntropy
    loss, nats, apart, unsure = function.apply(
        logits, targets, scale, mask_token_id, lesson, sharper
    )
    return loss, nats, apart, unsure


def uniform_divergence(
    logits: torch.Tensor,
    targets: torch.Tensor,
    noisy: torch.Tensor,
    kept: torch.Tensor,
    mask_token_id: int,
) -> torch.Tensor:
    """KL of q(x_{t-1} | x_t, x_0) from the model's p(x_{t-1} | x_t), uniform kernel.

    With V words (the mask is none of them), a = alpha(t)/alpha(t-1/T) and r(k) = a [k = x_t] +
    (1-a)/V, both are r(k) times a mixture, normalised: of the clean token for q, of the model's
    prediction for p (D3PM, arXiv 2107.03006, section 3.3). At t = 1/T it is -log p(x_0 | x_1).

    Args:
        logits: Predictions of the clean tokens, shape (n, vocab); the mask's may be overwritten.
        targets: Clean tokens x_0, shape (n,).
        noisy: Noisy tokens x_t, shape (n,).
        kept: alpha(t - 1/T) and alpha(t), shape (n, 2), float64.
        mask_token_id: Token that is never predicted and never noise.

    Returns:
        Nats, shape (n,), not multiplied by T.
    """
    words = logits.shape[-1] - 1
    before, now = kept.to(logits.device, torch.float32).unbind(-1)
    step = now / before
    floor, rest = (1 - before) / words, (1 - step) / words
    guess = _without_mask(logits, mask_token_id).softmax(-1)
    tiny = torch.finfo(guess.dtype).tiny
    mixture = (before[:, None] * guess + floor[:, None]).clamp(min=tiny).log()
    at = torch.stack([targets, noisy], dim=-1)
    at_target, at_noisy = mixture.gather(-1, at).unbind(-1)
    same = (targets == noisy).float()
    prior = (1 - now) / words
    guess_noisy = guess.gather(-1, noisy[:, None]).squeeze(-1)
    q_total, p_total = now * same + prior, now * guess_noisy + prior
    # q(k) is nonzero everywhere (rest * floor), more at the noisy token and more at the clean one.
    everywhere = mixture.sum(-1) - mixture[:, mask_token_id]
    p_log = (
        rest * floor * everywhere
        + step * floor * at_noisy
        + rest * before * at_target
        + step * before * same * at_target
    )
    high, low = (before + floor).log(), floor.clamp(min=tiny).log()
    q_log = (
        rest * floor * (words - 1) * low
        + step * floor * torch.where(same > 0, high, low)
        + rest * (before + floor) * high
        + step * before * same * high
    )
    return (q_log - p_log) / q_total - q_total.log() + p_total.log()
