"""What is learnt from a teacher: values and gradients of torch, for every divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dllm_convert.common.terms import Divergence
from dllm_convert.diffusion import losses
from dllm_convert.diffusion.distillation import Distillation, Lesson
from dllm_convert.diffusion.losses import linear_cross_entropy, taught_cross_entropy

MASK, WORDS, TAUGHT = 3, 41, 17


def given() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(23, 16, generator=draw).requires_grad_(),
        "weight": torch.randn(WORDS, 16, generator=draw).requires_grad_(),
        "bias": torch.randn(WORDS, generator=draw).requires_grad_(),
        "targets": torch.randint(4, WORDS, (23,), generator=draw),
        "scale": torch.rand(23, generator=draw),
    }


def teacher() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((TAUGHT, 8), (WORDS, 8), (WORDS,))
    hidden, matrix, bias = (torch.randn(*shape, generator=draw) for shape in shapes)
    return hidden, matrix, bias


def softened(logits: torch.Tensor, how: Distillation, mask: int, *, most: bool) -> torch.Tensor:
    """Log-probabilities over all words but the mask, in float64."""
    logits = logits.double().clone()
    logits[:, mask : mask + 1] = -torch.inf
    if most and how.top_k is not None:
        last = min(how.top_k, WORDS) - 1
        least = logits.sort(-1, descending=True).values[:, last : last + 1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return (logits / how.temperature).log_softmax(-1)


def expected(
    values: dict[str, Any], taught: torch.Tensor, how: Distillation, mask: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the divergences, by autograd, in float64."""
    logits = torch.nn.functional.linear(values["hidden"], values["weight"], values["bias"])
    student = softened(logits, Distillation(1.0), mask, most=False)
    nats = torch.nn.functional.nll_loss(student, values["targets"], reduction="none")
    p = softened(taught, how, mask, most=True)
    q = softened(logits[: len(taught)], how, mask, most=False)
    if how.divergence == "forward_kl":
        parts = torch.where(p.exp() > 0, p.exp() * (p - q.clamp(min=-1e9)), 0.0)
    elif how.divergence == "reverse_kl":
        parts = torch.where(q.exp() > 0, q.exp() * (q - p).nan_to_num(), 0.0)
    else:
        parts = (p.exp() - q.exp()).abs() / 2
    apart = parts.sum(-1) * how.temperature**2
    mixed = torch.cat([(1 - how.weight) * nats[: len(taught)] + how.weight * apart,
                       nats[len(taught):]])  # fmt: skip
    return (mixed * values["scale"]).sum(), apart


HOWS = [
    Distillation(weight, kind, temperature, top_k)
    for kind in ("forward_kl", "reverse_kl", "total_variation")
    for weight, temperature in ((0.3, 1.0), (1.0, 2.5))
    for top_k in ((None,) if kind == "reverse_kl" else (None, 1, 6, 100))
]


@pytest.mark.parametrize("mask", [MASK, WORDS + 5], ids=["mask", "no-row"])
@pytest.mark.parametrize("pieces", [(7, 3), (100, 100)])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_losses_and_gradients_are_those_of_autograd(
    how: Distillation, pieces: tuple[int, int], mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_rows_of_products", lambda weight: pieces[0])
    monkeypatch.setattr(losses, "rows_at_once", lambda logits: pieces[1])
    hidden, matrix, bias = teacher()
    logits = torch.nn.functional.linear(hidden, matrix, bias)
    plain = given()
    loss, apart = expected(plain, logits, how, mask)
    loss.backward()
    for lesson in (Lesson(how, hidden, matrix, bias), Lesson(how, logits).most(mask)):
        fused = given()
        found, nats, divergences, _ = linear_cross_entropy(
            **fused, mask_token_id=mask, lesson=lesson
        )
        found.backward()
        dense = given()
        values = torch.nn.functional.linear(dense["hidden"], dense["weight"], dense["bias"])
        also, _, the_same, _ = taught_cross_entropy(
            values, dense["targets"], dense["scale"], mask, lesson
        )
        (2 * also).backward()
        for total in (found, also):
            torch.testing.assert_close(total.double(), loss.detach(), atol=1e-4, rtol=1e-5)
        assert not divergences.requires_grad and not nats.requires_grad
        for parts in (divergences, the_same):
            torch.testing.assert_close(
                parts[:TAUGHT].double(), apart.detach(), atol=1e-4, rtol=1e-4
            )
            assert not parts[TAUGHT:].any()
        for name in ("hidden", "weight", "bias"):
            torch.testing.assert_close(fused[name].grad, plain[name].grad, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(dense[name].grad, 2 * plain[name].grad, atol=4e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "total_variation"])
def test_words_that_a_model_can_never_write_are_no_nan(kind: Divergence) -> None:
    """Some models write -inf for rows of padding, in the teacher as in the student."""
    hidden, matrix, bias = teacher()
    logits = torch.nn.functional.linear(hidden, matrix, bias)
    logits[:, -4:] = -torch.inf
    draw = torch.Generator().manual_seed(2)
    student = torch.randn(TAUGHT, WORDS, generator=draw).requires_grad_()
    targets, scale = torch.full((TAUGHT,), 7), torch.ones(TAUGHT)
    lesson = Lesson(Distillation(0.5, kind), logits)
    loss, *_ = taught_cross_entropy(student, targets, scale, MASK, lesson)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()
    # A student that agrees has nothing to learn from it.
    same = logits.clone().requires_grad_()
    lesson = Lesson(Distillation(1.0, kind), logits)
    loss, _, apart, _ = taught_cross_entropy(same, targets, scale, MASK, lesson)
    loss.backward()
    assert same.grad is not None
    assert float(apart.abs().max()) < 1e-5
    if kind != "total_variation":  # which has a kink there
        assert float(same.grad.abs().max()) < 1e-6
