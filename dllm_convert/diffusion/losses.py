"""What a prediction costs, in nats: cross-entropy, and D3PM's bound for the uniform kernel."""

from __future__ import annotations

from typing import Any

import torch


def _without_mask(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    # In place, if it is float32 already, and unseen by autograd: another copy of the logits or of
    # their gradient is as large as all of a small model. The gradient there is zero by itself.
    scores = logits.float()
    with torch.no_grad():
        scores[:, mask_token_id] = -torch.inf
    return scores


def _rows_at_once(logits: torch.Tensor) -> int:
    # Of a CPU's cache; on a GPU few kernels.
    entries = 1 << 20 if logits.device.type == "cpu" else 1 << 26
    return max(1, entries // max(1, logits.shape[-1]))


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
        nats, size = torch.empty_like(total), _rows_at_once(logits)
        pieces = (torch.split(part, size) for part in (logits, targets, total, nats))
        for rows, target, sums, out in zip(*pieces, strict=True):
            scores = rows.to(torch.float32, copy=True)
            scores[:, mask_token_id] = -torch.inf
            torch.logsumexp(scores, dim=-1, out=sums)
            torch.sub(sums, scores.gather(-1, target[:, None]).squeeze(-1), out=out)
        ctx.save_for_backward(logits, targets, total)
        ctx.mask_token_id = mask_token_id
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, total = ctx.saved_tensors
        result, size = torch.empty_like(logits), _rows_at_once(logits)
        pieces = (part.split(size) for part in (logits, result, targets, total, gradients[0]))
        for rows, out, target, sums, gradient in zip(*pieces, strict=True):
            scores = rows.to(torch.float32, copy=True).sub_(sums[:, None]).exp_()
            scores[:, ctx.mask_token_id] = 0
            scores.scatter_add_(-1, target[:, None], scores.new_full((len(target), 1), -1.0))
            out.copy_(scores.mul_(gradient[:, None]))
        return result, None, None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Cross-entropy in nats, shape (n,), of logits (n, vocab) that can never predict the mask."""
    function: Any = _CrossEntropy
    nats: torch.Tensor = function.apply(logits, targets, mask_token_id)
    return nats


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
