"""The head and its loss in one: values and gradients of torch, whatever the size of pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dllm_convert.diffusion import losses
from dllm_convert.diffusion.losses import cross_entropy, linear_cross_entropy

MASK = 3


def given(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

    return {
        "hidden": normal(23, 16),
        "weight": normal(41, 16),
        "bias": normal(41),
        "targets": torch.randint(4, 41, (23,), generator=draw),
        "scale": torch.rand(23, generator=draw),
    }


@pytest.mark.parametrize("pieces", [(1, 1), (7, 3), (100, 2), (100, 100)])
@pytest.mark.parametrize("upstream", [1.0, 0.25])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias"), ("bias",)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_logits(
    biased: bool,
    frozen: tuple[str, ...],
    upstream: float,
    pieces: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "_rows_of_products", lambda weight: pieces[0])
    monkeypatch.setattr(losses, "rows_at_once", lambda logits: pieces[1])
    ours, plain = given(), given()
    for values in (ours, plain):
        if not biased:
            values["bias"] = None
        for name in frozen:
            if values[name] is not None:
                values[name] = values[name].detach()
    loss, nats, *_ = linear_cross_entropy(**ours, mask_token_id=MASK)
    (loss * upstream).backward()
    logits = torch.nn.functional.linear(plain["hidden"], plain["weight"], plain["bias"])
    logits = logits.clone()
    logits[:, MASK] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, plain["targets"], reduction="none")
    ((expected * plain["scale"]).sum() * upstream).backward()
    assert torch.allclose(nats, expected, atol=1e-5)
    assert not nats.requires_grad
    for name in ("hidden", "weight", "bias"):
        if plain[name] is None or plain[name].grad is None:
            assert ours[name] is None or ours[name].grad is None
            continue
        assert torch.allclose(ours[name].grad, plain[name].grad, atol=1e-5), name
        assert ours[name].grad.dtype == plain[name].dtype


def test_under_autocast_products_are_bfloat16_and_sums_float32() -> None:
    ours, plain = given(), given()
    with torch.autocast("cpu", torch.bfloat16):
        loss, nats, *_ = linear_cross_entropy(**ours, mask_token_id=MASK)
        logits = torch.nn.functional.linear(plain["hidden"], plain["weight"], plain["bias"])
    assert logits.dtype == torch.bfloat16
    expected = cross_entropy(logits, plain["targets"], MASK)
    assert torch.equal(nats, expected)
    assert loss.dtype == torch.float32
    loss.backward()
    (expected * plain["scale"]).sum().backward()
    for name in ("hidden", "weight", "bias"):
        apart = (ours[name].grad - plain[name].grad).norm() / plain[name].grad.norm()
        assert apart < 1e-2, name
        assert ours[name].grad.dtype == torch.float32


def test_nothing_to_score_costs_nothing() -> None:
    values = given()
    values["hidden"] = values["hidden"][:0]
    values["targets"], values["scale"] = values["targets"][:0], values["scale"][:0]
    loss, nats, *_ = linear_cross_entropy(**values, mask_token_id=MASK)
    loss.backward()
    assert float(loss.detach()) == 0
    assert nats.shape == (0,)
    assert not values["weight"].grad.any()


def test_no_more_logits_are_there_than_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_rows_of_products", lambda weight: 4)
    made = []
    plain = torch.nn.functional.linear

    def seen(*given: Any) -> torch.Tensor:
        result = plain(*given)
        made.append(result.shape)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", seen)
    linear_cross_entropy(**given(), mask_token_id=MASK)[0].backward()
    assert made == [(4, 41)] * 5 + [(3, 41)]
