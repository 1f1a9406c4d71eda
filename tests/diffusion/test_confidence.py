"""Being surer where a prediction is right: values and gradients of torch, and what it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_divergences import MASK, WORDS, expected, given, teacher

from dllm_convert.diffusion import losses
from dllm_convert.diffusion.confidence import Sharpening
from dllm_convert.diffusion.distillation import Distillation, Lesson
from dllm_convert.diffusion.losses import linear_cross_entropy, taught_cross_entropy


def half_right() -> dict[str, Any]:
    """Every other row's likeliest word is its target."""
    values = given()
    with torch.no_grad():
        logits = torch.nn.functional.linear(values["hidden"], values["weight"], values["bias"])
        logits[:, MASK] = -torch.inf
        values["targets"][::2] = logits.argmax(-1)[::2]
    return values


def entropies(values: dict[str, Any], mask: int) -> torch.Tensor:
    """Entropy where the likeliest word is right, by autograd, in float64."""
    logits = torch.nn.functional.linear(values["hidden"], values["weight"], values["bias"]).double()
    words = [word for word in range(WORDS) if word != mask]
    kept = logits[:, words]
    entropy = torch.distributions.Categorical(logits=kept).entropy()
    right = torch.tensor(words)[kept.argmax(-1)] == values["targets"]
    return torch.where(right, entropy, 0.0)


@pytest.mark.parametrize("mask", [MASK, WORDS + 5], ids=["mask", "no-row"])
@pytest.mark.parametrize("pieces", [(7, 3), (100, 100)])
@pytest.mark.parametrize("rows", [23, 19, 4])
@pytest.mark.parametrize("how", [None, Distillation(0.3), Distillation(0.6, "reverse_kl", 2.0)])
def test_losses_and_gradients_are_those_of_autograd(
    how: Distillation | None,
    rows: int,
    pieces: tuple[int, int],
    mask: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "_rows_of_products", lambda weight: pieces[0])
    monkeypatch.setattr(losses, "rows_at_once", lambda logits: pieces[1])
    hidden, matrix, bias = teacher()
    plain = half_right()
    taught = torch.nn.functional.linear(hidden, matrix, bias)
    loss, _ = expected(plain, taught, how or Distillation(1e-300), mask)
    unsure = entropies(plain, mask)
    first = torch.arange(23) < rows
    assert int((unsure[first] > 0).sum()) > 3 or rows == 4
    loss = loss + (0.7 * torch.where(first, unsure, 0.0) * plain["scale"]).sum()
    loss.backward()
    sharper = Sharpening(0.7, rows)
    lesson = None if how is None else Lesson(how, hidden, matrix, bias)

    fused, dense = half_right(), half_right()
    found, nats, apart, seen = linear_cross_entropy(
        **fused, mask_token_id=mask, lesson=lesson, sharper=sharper
    )
    found.backward()
    logits = torch.nn.functional.linear(dense["hidden"], dense["weight"], dense["bias"])
    also, _, _, too = taught_cross_entropy(
        logits, dense["targets"], dense["scale"], mask, lesson, sharper
    )
    also.backward()
    assert not seen.requires_grad and (how is None) == (not apart.any()) and len(nats) == 23
    for total, parts, values in ((found, seen, fused), (also, too, dense)):
        torch.testing.assert_close(total.double(), loss.detach(), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(
            parts.double(), torch.where(first, unsure, 0.0).detach(), atol=1e-4, rtol=1e-4
        )
        for name in ("hidden", "weight", "bias"):
            torch.testing.assert_close(values[name].grad, plain[name].grad, atol=3e-5, rtol=1e-4)


def test_certain_and_impossible_words_are_no_nan() -> None:
    logits = torch.zeros(3, WORDS)
    logits[:, -4:] = -torch.inf  # Rows of padding in some models.
    logits[0, 7] = 300.0  # As sure as a number can say.
    logits[1, 7] = 1.0
    logits.requires_grad_()
    targets, scale = torch.tensor([7, 7, 9]), torch.ones(3)
    loss, _, _, unsure = taught_cross_entropy(
        logits, targets, scale, MASK, sharper=Sharpening(1.0, 3)
    )
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
    assert float(unsure[0]) == pytest.approx(0.0, abs=1e-6) and unsure[1] > 3 and unsure[2] == 0


def test_it_makes_what_is_right_surer_and_leaves_what_is_wrong() -> None:
    """A toy: three readings, whose laws have 0.7, 0.5 and 0.1 for the word that is right.

    The cross-entropy alone ends in those laws. With the entropy the first two end surer than
    theirs, by what the optimum says; where the right word is not the likeliest nothing changes.
    """
    laws = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.3, 0.6, 0.1]], dtype=torch.float32)

    def trained(weight: float) -> torch.Tensor:
        # Every word of every reading, weighed by the law: the expectation, without noise.
        logits = laws.log().clone().requires_grad_()
        rows = torch.arange(3).repeat_interleave(3)
        targets, scale = torch.arange(3).repeat(3), laws.flatten()
        optimizer = torch.optim.SGD([logits], lr=0.5)
        sharper = Sharpening(weight, 9) if weight else None
        for _ in range(3000):
            loss, *_ = taught_cross_entropy(logits[rows], targets, scale, 3, sharper=sharper)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return logits.detach().softmax(-1)

    torch.testing.assert_close(trained(0.0), laws, atol=1e-3, rtol=0)
    surer = trained(0.5)
    likeliest = laws.argmax(-1, keepdim=True)
    assert (surer.gather(-1, likeliest) > laws.gather(-1, likeliest) + 0.02).all()
    # The optimum: where the likeliest word has the chance c, its gradient is that of
    # cross-entropy + 0.5 c H. Checked by autograd in float64.
    logits = surer.double().log().requires_grad_()
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    chance = laws.double().gather(-1, likeliest).squeeze(-1)
    (-(laws.double() * p.log()).sum(-1) + 0.5 * chance * entropy).sum().backward()
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-4
