"""Cross-entropy in pieces: values and gradients as torch's, and what is kept for the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dllm_convert.diffusion import losses
from dllm_convert.diffusion.losses import cross_entropy

MASK, WORDS = 3, 29


def reference(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    closed = torch.zeros(WORDS).index_fill(0, torch.tensor(MASK), -torch.inf)
    return F.cross_entropy(logits.float() + closed, targets, reduction="none")


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_values_and_gradients_are_torchs(
    count: int, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "rows_at_once", lambda _: rows)
    generator = torch.Generator().manual_seed(count)
    logits = (torch.randn(count, WORDS, generator=generator) * 5).to(dtype)
    targets = torch.randint(MASK + 1, WORDS, (count,), generator=generator)
    weight = torch.rand(count, generator=generator)
    before = logits.clone()
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    mine = cross_entropy(ours, targets, MASK)
    expected = reference(theirs, targets)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    assert not ours.grad[:, MASK].any()
    assert torch.equal(ours.detach(), before)


def test_it_can_be_differentiated_twice_over() -> None:
    logits = torch.randn(5, WORDS, requires_grad=True)
    loss = cross_entropy(logits, torch.full((5,), 7), MASK).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_target_that_is_the_mask_is_not_passed_over() -> None:
    assert cross_entropy(torch.randn(1, WORDS), torch.tensor([MASK]), MASK).isinf().all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.zeros(2, WORDS)
    logits[0, 5], logits[1, 6] = 3e38, -3e38
    found = cross_entropy(logits.requires_grad_(), torch.tensor([5, 5]), MASK)
    found.sum().backward()
    assert found.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_only_the_logits_are_kept() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    logits = torch.randn(50, 4000, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(logits, torch.full((50,), 7), MASK)
    others = sum(t.nbytes for t in kept if t.data_ptr() != logits.data_ptr())
    assert others <= 50 * 12
