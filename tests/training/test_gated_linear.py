"""A frozen layer and its adapter in one operation: the same numbers and gradients as apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import gated_folder

from dllm_convert.modeling.loading import load_model
from dllm_convert.modeling.published.gated import adapter_parameters
from dllm_convert.training import gated_linear as module
from dllm_convert.training.gated import train_adapter
from dllm_convert.training.gated_linear import gated_linear


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "rank"), [(7, 3), (1, 1), (5, 9)])
def test_result_and_gradients(rows: int, rank: int, biased: bool) -> None:
    x, down, up = states(rows, 6), states(rank, 6, seed=1), states(4, rank, seed=2)
    weight = states(4, 6, seed=3).detach()
    bias = states(4, seed=4).detach() if biased else None
    expected = torch.nn.functional.linear(x, weight, bias) + 1.7 * (x @ down.T @ up.T)
    found, low = gated_linear(x, weight, bias, down, up, 1.7)
    torch.testing.assert_close(found, expected)
    assert not low.requires_grad
    direction = states(rows, 4, seed=5).detach()
    theirs = torch.autograd.grad((expected * direction).sum(), (x, down, up))
    ours = torch.autograd.grad((found * direction).sum(), (x, down, up))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(
        lambda *given: gated_linear(given[0], weight, bias, given[1], given[2], 1.7)[0],
        (x, down, up),
    )


def test_the_operation_is_what_torch_expects_of_one() -> None:
    given = (states(5, 6), states(4, 6).detach(), None, states(3, 6), states(4, 3), 0.5)
    torch.library.opcheck(gated_linear, given)


def test_a_model_in_training_computes_the_same_with_it_and_without(
    source_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = gated_folder(source_cache("qwen2"), tmp_path / "g")
    plain = load_model(tmp_path / "g", plan.adapter)
    for weight in adapter_parameters(plain).values():
        weight.requires_grad_(True)
    fused = train_adapter(load_model(tmp_path / "g", plan.adapter), tmp_path / "g")
    calls: list[Any] = []
    real = module.gated_linear
    monkeypatch.setattr(module, "gated_linear", lambda *g: calls.append(1) or real(*g))
    ids = torch.randint(5, 380, (2, 24), generator=torch.Generator().manual_seed(1))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    some = torch.arange(24).expand_as(ids) >= 16
    for noisy, times in ((everywhere, 14), (some, 0), (None, 0)):
        calls.clear()
        one, other = (each(ids, noisy=noisy).logits for each in (fused, plain))
        assert len(calls) == times
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
        if noisy is None:
            assert torch.equal(one, other)
            continue
        gradients = []
        for model, logits in ((fused, one), (plain, other)):
            model.zero_grad()
            logits[:, 16:].logsumexp(-1).sum().backward()
            gradients.append({n: w.grad for n, w in adapter_parameters(model).items()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)


def test_under_autocast_it_multiplies_what_autocast_would(
    source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    """Matrices held in bfloat16 are those that autocast would make of them in every forward."""
    plan = gated_folder(source_cache("qwen3"), tmp_path / "g")
    plain = load_model(tmp_path / "g", plan.adapter)
    for weight in adapter_parameters(plain).values():
        weight.requires_grad_(True)
    half = torch.bfloat16
    fused = train_adapter(load_model(tmp_path / "g", plan.adapter), tmp_path / "g", dtype=half)
    kinds = {name: weight.dtype for name, weight in fused.named_parameters()}
    assert {kind for name, kind in kinds.items() if "proj.weight" in name} == {half}
    assert {kind for name, kind in kinds.items() if "proj.weight" not in name} == {torch.float32}
    ids = torch.randint(5, 380, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[:, ::3] = plan.mask.id
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    for noisy in (None, everywhere):
        exact = plain(ids, noisy=noisy).logits
        with torch.autocast("cpu", half):
            one, other = (each(ids, noisy=noisy).logits for each in (fused, plain))
        if noisy is None:
            assert torch.equal(one, other)
        # The sum of both products is rounded once, where apart it is rounded twice.
        rounding = [float((logits - exact).abs().mean()) for logits in (one, other)]
        assert rounding[0] < 1.25 * rounding[1]
    for model, logits in ((fused, one), (plain, other)):
        model.zero_grad()
        logits.float().logsumexp(-1).sum().backward()
    for (name, mine), theirs in zip(
        adapter_parameters(fused).items(), adapter_parameters(plain).values(), strict=True
    ):
        assert mine.grad is not None and theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert cosine > 0.98, name
