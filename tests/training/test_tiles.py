"""Training's attention on a CPU computes what sdpa computes, and only where somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from factory import FAMILIES
from masks import two_stream_mask
from test_trainer import converted
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_convert.modeling.loading import load_model
from dllm_convert.training import cpu_attention as module
from dllm_convert.training.checkpointing import checkpoint_activations
from dllm_convert.training.cpu_attention import TILED, register_tiles, tiled_attention, tiles
from dllm_convert.training.setup import attention_implementation


def states(
    *shape: int, kv_heads: int, keys: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape] + 2 * [(shape[0], kv_heads, keys, shape[3])]
    made = [torch.randn(each, generator=generator, dtype=dtype) for each in shapes]
    return [each.requires_grad_() for each in made]


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return found.transpose(1, 2)


def random_mask(share: float, *shape: int) -> torch.Tensor:
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    return seen | torch.eye(shape[-2], shape[-1], dtype=torch.bool)


def two_streams(length: int, block: int, rows: int = 1) -> torch.Tensor:
    at = torch.arange(length).expand(rows, -1)
    return two_stream_mask(at // block, torch.zeros_like(at))


MASKS = {
    "dense": random_mask(0.7, 2, 1, 70, 70),
    "thin": random_mask(0.02, 2, 1, 70, 70),
    "one for all rows": random_mask(0.3, 1, 1, 70, 70),
    "one per head": random_mask(0.3, 2, 6, 70, 70),
    "more keys than queries": random_mask(0.3, 2, 1, 33, 101),
    "two streams": two_streams(35, 5, 2),
    "two streams, whole tiles": two_streams(64, 32, 2),
    "open": torch.ones(2, 1, 40, 40, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_result_and_gradients_are_those_of_sdpa(name: str, kv_heads: int) -> None:
    mask = MASKS[name]
    queries, keys = mask.shape[-2:]
    inputs = states(2, 6, queries, 4, kv_heads=kv_heads, keys=keys)
    weights = torch.randn(2, queries, 6, 4, generator=torch.Generator().manual_seed(2))
    ours = tiled_attention(*inputs, mask, 0.3)[0]
    theirs = reference(*inputs, mask, 0.3)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    for mine, yours in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = states(1, 2, 37, 3, kv_heads=1, keys=37)
    mask = random_mask(0.2, 1, 1, 37, 37)
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, mask, 0.5)[0], inputs)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient() -> None:
    inputs = states(1, 2, 40, 4, kv_heads=2, keys=40)
    mask = random_mask(0.5, 1, 1, 40, 40)
    mask[:, :, 3] = False
    mask[:, :, 32:] = False  # a whole tile of them
    result = tiled_attention(*inputs, mask, 1.0)[0]
    assert (result[:, 3] == 0).all() and (result[:, 32:] == 0).all()
    assert (result[:, :3] != 0).all()
    gradients = torch.autograd.grad(result.sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, 3] == 0).all() and (gradients[0][:, :, 32:] == 0).all()


def test_scores_far_apart_overflow_nothing() -> None:
    query, key, value = states(1, 1, 40, 4, kv_heads=1, keys=40, dtype=torch.float32)
    mask = random_mask(0.5, 1, 1, 40, 40)
    inputs = [(query * 300).detach().requires_grad_(), (key * 300).detach().requires_grad_(), value]
    ours, theirs = tiled_attention(*inputs, mask, 1.0)[0], reference(*inputs, mask, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours.sum(), inputs))


def test_low_precision_rounds_the_result_only() -> None:
    inputs = states(2, 4, 96, 16, kv_heads=2, keys=96, dtype=torch.float32)
    mask = two_streams(48, 16, 2)
    exact = tiled_attention(*(x.double() for x in inputs), mask, 0.25)[0]
    low = [x.detach().bfloat16() for x in inputs]
    same = tiled_attention(*(x.double() for x in low), mask, 0.25)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = tiled_attention(*low, mask, 0.25)[0]
    assert rounded.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 digits: nothing inside was rounded before.
    torch.testing.assert_close(rounded.double(), same, rtol=2**-8, atol=1e-6)
    assert (exact - same).abs().max() > 1e-4


def test_tiles_that_nobody_sees_into_are_left_out() -> None:
    found = tiles(two_streams(256, 32), 512, 512)
    assert [(tile.start, tile.end) for tile in found] == [(at, at + 32) for at in range(0, 512, 32)]
    # A noisy block sees itself and the clean blocks before it; a clean one itself and those.
    assert found[0].keys == ((0, 32),)
    assert found[3].keys == ((96, 128), (256, 352))
    assert found[11].keys == ((256, 384),)
    assert all(tile.is_open for tile in found)
    pairs = sum((end - start) * 32 for tile in found for start, end in tile.keys)
    assert pairs == int(two_streams(256, 32).sum())


def test_tiles_that_are_partly_shut_say_so() -> None:
    mask = two_streams(24, 8)  # 48 positions: the second tile is half empty
    found = tiles(mask, 48, 48)
    assert [tile.end for tile in found] == [32, 48]
    assert not any(tile.is_open for tile in found)
    assert tiles(torch.ones(1, 1, 48, 48, dtype=torch.bool), 48, 48)[1].is_open
    assert [tile.keys for tile in tiles(None, 48, 50)] == [((0, 50),)] * 2


def loss_and_gradients(model: Any, mask: torch.Tensor, **inputs: Any) -> tuple[float, list[Any]]:
    model.zero_grad()
    logits = model(attention_mask=mask, **inputs).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_every_family_trains_as_with_sdpa(
    family: str, checkpointing: Any, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, _ = converted(source_cache(family), tmp_path / "a")
    mask = two_streams(20, 4, 2)
    at = torch.arange(20).repeat(2).expand(2, -1)
    inputs = {
        "input_ids": torch.randint(5, 60, (2, 40), generator=torch.Generator().manual_seed(0)),
        "position_ids": at,
        "logits_at": torch.arange(0, 80, 9),
        "use_cache": False,
    }
    results = []
    for attention in ("sdpa", register_tiles()):
        model = load_model(tmp_path / "a", plan.adapter, attention=attention)
        for part in model.train().modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        checkpoint_activations(model, checkpointing)
        results.append(loss_and_gradients(model, mask, **inputs))
    (theirs, expected), (ours, found) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(found) == len(expected) > 0
    for mine, yours in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-5)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(function.name()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("checkpointing", "forwards"), [("off", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_computes_no_attention_again(
    checkpointing: Any, forwards: int, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, _ = converted(source_cache("llama"), tmp_path / "a")
    model = load_model(tmp_path / "a", plan.adapter, attention=register_tiles()).train()
    checkpoint_activations(model, checkpointing)
    with Calls() as calls:
        model(
            input_ids=torch.arange(5, 45)[None],
            attention_mask=two_streams(20, 4),
            position_ids=torch.arange(20).repeat(2)[None],
        ).logits.sum().backward()
    layers = model.config.num_hidden_layers
    assert calls.names.count("dllm_convert::tiled_attention") == forwards * layers
    assert calls.names.count("dllm_convert::tiled_attention_backward") == layers
    assert not any("scaled_dot_product" in name for name in calls.names)


class Layer(torch.nn.Module):
    is_causal = False
    num_key_value_groups = 1


@pytest.fixture
def sent_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    used: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        used.append("sdpa")
        return original(*args, **kwargs)

    original = module.sdpa_attention_forward
    monkeypatch.setattr(module, "sdpa_attention_forward", counted)
    yield used


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"dropout": 0.1}, ["sdpa"]),
        ({"attention_mask": None}, ["sdpa"]),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, ["sdpa"]),
    ],
)
def test_what_tiles_do_not_compute_goes_to_sdpa(
    given: dict[str, Any], expected: list[str], sent_on: list[str]
) -> None:
    inputs = states(1, 2, 9, 4, kv_heads=2, keys=9)
    settings = {"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool), **given}
    result, weights = module.tiled_attention_forward(Layer(), *inputs, **settings)
    assert sent_on == expected
    assert weights is None
    assert result.shape == (1, 9, 2, 4)


def test_the_operations_are_what_torch_expects_of_operations() -> None:
    inputs = states(1, 2, 40, 4, kv_heads=1, keys=40, dtype=torch.float32)
    torch.library.opcheck(tiled_attention, (*inputs, two_streams(20, 4), 0.5))
    torch.library.opcheck(tiled_attention, (*inputs, None, 0.5))


@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
def test_a_training_on_a_cpu_uses_them_unless_told_otherwise(
    target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, _ = converted(source_cache("llama"), tmp_path / "a")
    on_gpu = torch.accelerator.is_available()

    def chosen(name: str) -> str:
        training = plan.recipe.training.model_copy(update={"attention": name})
        recipe = plan.recipe.model_copy(update={"training": training, "target": target})
        return attention_implementation(recipe, plan.adapter)

    assert on_gpu or chosen("auto") == TILED
    assert chosen("tiles") == TILED
    assert chosen("sdpa") == "sdpa"
