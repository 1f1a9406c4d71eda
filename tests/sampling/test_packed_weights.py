"""Packed weights: the same products, only while decoding, and never of a weight that is gone."""

from __future__ import annotations

import copy
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from factory import FAMILIES
from tiny_decoders import DECODERS, prompt, tiny
from torch import nn

from dllm_convert.sampling import packing
from dllm_convert.sampling.packing import can_pack, packed_linears

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN")


def decode(model: Any, *args: Any, **settings: Any) -> Any:
    with packed_linears(model):
        return model.generate(*args, **settings)


def replaced(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (2, 5), (33,)])
@torch.no_grad()
def test_the_product_is_that_of_linear(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    if not can_pack(dtype):
        pytest.skip(f"no kernels for {dtype}")
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias, dtype=dtype)
    x = torch.randn(*shape, 24, dtype=dtype)
    expected = layer(x)
    with packed_linears(layer):
        assert replaced(layer) == 1
        found = layer(x)
    assert replaced(layer) == 0
    assert found.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_writes_the_same_tokens(family: str) -> None:
    model = tiny(family, block=4 if family in DECODERS else None).float()
    given, settings = prompt(9), {"max_new_tokens": 11, "eos_token_id": None}
    packed = decode(model, given, **settings)
    # Every layer, the head too: fewer would be slower and no test would see it.
    kept = packing._KEPT[model]._packed
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    assert sum(sum(one.rows) for one in kept.values()) == sum(len(one.weight) for one in linears)
    joined = family == "modernbert"  # its class has one matrix for them
    assert joined or len(kept) < len(linears)  # queries, keys and values are one product
    plain = model.generate(given, **settings)
    assert packed.tolist() == plain.tolist()
    assert replaced(model) == 0


def test_a_changed_weight_is_packed_anew() -> None:
    model, settings = tiny("llama", block=4).float(), {"max_new_tokens": 8, "eos_token_id": None}
    before = decode(model, prompt(6), **settings)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        -model.model.layers[0].mlp.up_proj.weight.detach()
    )
    after = decode(model, prompt(6), **settings)
    assert after.tolist() == model.generate(prompt(6), **settings).tolist()
    assert after.tolist() != before.tolist()


def test_nothing_is_left_behind_by_a_failure() -> None:
    model = tiny("llama", block=4).float()
    during: list[int] = []

    def observe(_: Any) -> None:
        during.append(replaced(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(model, prompt(6), max_new_tokens=8, observer=observe)
    assert during[0] > 10
    assert replaced(model) == 0
    loss = model(prompt(6)).logits.sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_two_threads_decode_with_one_model() -> None:
    model = tiny("llama", block=4).float()
    settings = {"max_new_tokens": 24, "eos_token_id": None}
    expected = [decode(model, prompt(6, seed), **settings).tolist() for seed in range(4)]
    found: dict[int, Any] = {}

    def run(seed: int) -> None:
        found[seed] = decode(model, prompt(6, seed), **settings).tolist()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == expected
    assert replaced(model) == 0


def test_copies_and_saved_models_hold_no_packed_weights(tmp_path: Path) -> None:
    model = tiny("llama", block=4).float()
    names = set(model.state_dict())
    expected = decode(model, prompt(6), max_new_tokens=8, eos_token_id=None)
    twin = copy.deepcopy(model)
    assert twin not in packing._KEPT
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert decode(model, prompt(6), max_new_tokens=8, eos_token_id=None).equal(expected)
    assert not decode(twin, prompt(6), max_new_tokens=8, eos_token_id=None).equal(expected)
    assert not [name for name in vars(model) if "packed" in name]
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("room", [0, 3000])
def test_too_little_memory_packs_nothing(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(24, 40, bias=False)
    # A quarter of it holds less than the 3,840 bytes of this weight.
    monkeypatch.setattr(packing, "available_bytes", lambda: room * 4)
    with packed_linears(layer):
        assert replaced(layer) == 0
    monkeypatch.setattr(packing, "available_bytes", lambda: 4 * 3840)
    with packed_linears(layer):
        assert replaced(layer) == 1


@torch.no_grad()
def test_what_is_not_a_plain_float_layer_is_left_alone() -> None:
    class Special(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    hooked = nn.Linear(8, 8)
    # As accelerate does, where layers are moved to and fro.
    original = partial(nn.Linear.forward, hooked)
    hooked.forward = original  # type: ignore[method-assign]
    others = nn.ModuleList(
        [Special(8, 8), nn.Linear(8, 8).double(), nn.Linear(8, 8).half(), hooked]
    )
    with packed_linears(others):
        assert replaced(others) == 1
    assert vars(hooked)["forward"] is original
    plain = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_linears(plain):
        assert replaced(plain) == 0


def test_a_torch_whose_kernels_multiply_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "_pack", lambda weight: -weight)
    fresh = packing.can_pack.__wrapped__
    assert not fresh(torch.float32)

    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this operation changed")

    monkeypatch.setattr(packing, "_pack", refuse)
    assert not fresh(torch.float32)
