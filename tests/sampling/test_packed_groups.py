"""Layers that are given one tensor are one product, and give what each gives by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gated import FAMILIES, gated_folder
from torch import nn

from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.sampling import packing
from dllm_convert.sampling.packing import can_pack, packed_linears

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN")


class Attention(nn.Module):
    """Queries, keys and values of what each is given."""

    def __init__(self, bias: tuple[bool, bool, bool] = (False,) * 3) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 12, bias=bias[0])
        self.k_proj = nn.Linear(8, 4, bias=bias[1])
        self.v_proj = nn.Linear(8, 4, bias=bias[2])

    def forward(self, *given: torch.Tensor) -> list[torch.Tensor]:
        layers = self.q_proj, self.k_proj, self.v_proj
        return [layer(x) for layer, x in zip(layers, given, strict=True)]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every packed matrix that is multiplied with."""
    found: list[int] = []

    def counted(packed: Any, bias: Any, x: Any, plain: Any = packing._multiply) -> Any:
        result = plain(packed, bias, x)
        found.append(result.shape[-1])
        return result

    monkeypatch.setattr(packing, "_multiply", counted)
    return found


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, True)])
@torch.no_grad()
def test_three_layers_are_one_product(bias: tuple[bool, bool, bool], products: list[int]) -> None:
    torch.manual_seed(0)
    model, x = Attention(bias), torch.randn(2, 5, 8)
    expected = model(x, x, x)
    with packed_linears(model):
        products.clear()
        torch.testing.assert_close(model(x, x, x), expected)
        assert products == [20]
        torch.testing.assert_close(model(x, x, x), expected)  # the same tensor a second time
        assert products == [20, 20]


@torch.no_grad()
def test_layers_of_other_tensors_are_right_too(products: list[int]) -> None:
    torch.manual_seed(0)
    model, (x, y) = Attention(), torch.randn(2, 1, 5, 8)
    expected, one = model(x, y, x), model.k_proj(x)
    with packed_linears(model):
        torch.testing.assert_close(model(x, y, x), expected)
        torch.testing.assert_close(model.k_proj(x), one)
        torch.testing.assert_close(model.k_proj(x), one)  # nothing is handed out twice
        assert model.q_proj(x[:0]).shape == (0, 5, 12)


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_was_written_to_is_another_one(inference: bool) -> None:
    model = Attention()
    with torch.inference_mode(inference), torch.no_grad(), packed_linears(model):
        x = torch.randn(1, 3, 8)
        model.q_proj(x)
        if not inference:  # there nothing tells
            x.mul_(2)
            torch.testing.assert_close(
                model.k_proj(x), nn.functional.linear(x, model.k_proj.weight)
            )
        y = x + 1
        torch.testing.assert_close(model.v_proj(y), nn.functional.linear(y, model.v_proj.weight))


@torch.no_grad()
def test_a_bias_that_was_changed_is_packed_anew() -> None:
    model, x = Attention((True, True, True)), torch.randn(1, 3, 8)
    with packed_linears(model):
        before = model(x, x, x)[1]
    model.k_proj.bias.add_(1)
    with packed_linears(model):
        torch.testing.assert_close(model(x, x, x)[1], before + 1)


@torch.no_grad()
def test_a_watched_layer_is_still_watched() -> None:
    model, x, seen = Attention(), torch.randn(1, 3, 8), []
    model.k_proj.register_forward_hook(lambda *_: seen.append(1))
    with packed_linears(model):
        model(x, x, x)
    model(x, x, x)
    assert len(seen) == 2


@pytest.fixture(scope="module", params=FAMILIES)
def gated(
    request: pytest.FixtureRequest, source_cache: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = Path(tmp_path_factory.mktemp("packed") / "gated")
    gated_folder(source_cache(request.param), folder)
    return load_checkpoint(folder, device="cpu").model.float()


NOISY = {
    "none": None,
    "last": [[0, 0, 0, 1, 1, 1]] * 2,
    "all": [[1] * 6] * 2,
    "scattered": [[0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 0]],
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("where", NOISY)
@torch.no_grad()
def test_an_adapter_is_part_of_the_product(
    gated: Any, where: str, rows: int, products: list[int]
) -> None:
    ids = torch.randint(6, 60, (2, 6), generator=torch.Generator().manual_seed(0))[:rows]
    noisy = NOISY[where]
    more: dict[str, Any] = {} if noisy is None else {"noisy": torch.tensor(noisy)[:rows] == 1}
    expected = gated(ids, **more).logits
    hooks = [len(module._forward_hooks) for module in gated.modules()]
    with packed_linears(gated):
        products.clear()
        torch.testing.assert_close(gated(ids, **more).logits, expected, rtol=1e-4, atol=1e-4)
        # Four products of a layer, and the head; before there were seven and an adapter of each.
        assert len(products) == 4 * gated.config.num_hidden_layers + 1
    assert [len(module._forward_hooks) for module in gated.modules()] == hooks
    torch.testing.assert_close(gated(ids, **more).logits, expected, rtol=0, atol=0)
