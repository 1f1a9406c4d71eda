"""What is built without its weights and read part by part is what is loaded whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from factory import FAMILIES
from gated import FAMILIES as GATED
from gated import gated_folder
from safetensors.torch import load_file, save_file
from test_trainer import converted

from dllm_convert.adapters import get_adapter
from dllm_convert.modeling.hollow import hollow_model
from dllm_convert.modeling.slices import Slices
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.training import setup
from dllm_convert.training.data.mask_noise import MaskNoise
from dllm_convert.training.distributed import shards_weights
from dllm_convert.training.setup import trainable_model
from dllm_convert.training.shards import fill_shards, is_empty

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 4, "embeddings": "full"}},
    "mask-row": {"method": "lora", "lora": {"rank": 4, "embeddings": "mask_row"}},
}


def both(plan: ConversionPlan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The model as one process loads it, and as shards are filled, here with all there is."""
    torch.manual_seed(0)
    whole = trainable_model(plan, folder)
    monkeypatch.setattr(setup, "shards_weights", lambda: True)
    torch.manual_seed(0)
    model = trainable_model(plan, folder)
    assert is_empty(model)
    fill_shards(model, folder, torch.device("cpu"))
    return whole, model


def assert_same(whole: Any, model: Any) -> None:
    for of in ("named_parameters", "named_buffers"):
        ours = dict(getattr(model, of)(remove_duplicate=False))
        theirs = dict(getattr(whole, of)(remove_duplicate=False))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert ours[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(ours[name], tensor), name
    # What is tied there is tied here.
    assert len(list(model.parameters())) == len(list(whole.parameters()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_filled_from_slices_is_the_one_loaded_whole(
    family: str,
    method: str,
    tied: bool,
    tmp_path: Path,
    source_cache: SourceFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = source_cache(family, tied=tied)
    plan, _ = converted(source, tmp_path / "a", **METHODS[method])
    whole, model = both(plan, tmp_path / "a", monkeypatch)
    assert_same(whole, model)


@pytest.mark.parametrize("family", GATED)
def test_a_gated_model_is_too(
    family: str, tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 4, "acts_on": "noisy"}
    settings = {"method": "lora", "lora": lora, "precision": "fp32"}
    plan = gated_folder(source_cache(family), tmp_path / "g", filled=True, training=settings)
    whole, model = both(plan, tmp_path / "g", monkeypatch)
    assert_same(whole, model)
    assert [layer.forward.__class__ for layer in model.modules()] == [
        layer.forward.__class__ for layer in whole.modules()
    ]


def test_nothing_is_held_before_it_is_read(
    tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = converted(source_cache("llama", tied=False), tmp_path / "a", **METHODS["lora"])
    monkeypatch.setattr(setup, "shards_weights", lambda: True)
    model = trainable_model(plan, tmp_path / "a")
    real = [name for name, weight in model.named_parameters() if weight.device.type != "meta"]
    assert real
    assert all("lora_" in name for name in real)


@pytest.mark.parametrize("damage", ["missing", "shape", "twice"])
def test_files_that_are_not_the_class_are_loaded_whole(
    damage: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    converted(source_cache("llama", tied=True), tmp_path / "a", **METHODS["full"])
    file = tmp_path / "a/model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    elif damage == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    settings: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa"}
    assert hollow_model(tmp_path / "a", get_adapter("llama"), **settings) is not None
    save_file(tensors, file, {"format": "pt"})
    assert hollow_model(tmp_path / "a", get_adapter("llama"), **settings) is None


@pytest.mark.parametrize(
    ("shape", "first", "size"),
    [
        ((7, 5), (0, 0), (7, 5)),
        ((7, 5), (3, 0), (4, 5)),
        ((7, 5), (2, 1), (3, 2)),
        ((7, 5), (7, 0), (0, 5)),
        ((4, 3, 2), (1, 1, 0), (2, 2, 2)),
        ((9,), (4,), (5,)),
        ((), (), ()),
    ],
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slice_is_what_it_is_of_the_whole(
    shape: Sequence[int],
    first: Sequence[int],
    size: Sequence[int],
    stored: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In pieces of a few rows.
    monkeypatch.setattr("dllm_convert.modeling.slices._PIECE", 16)
    tensors = {"before": torch.ones(3), "tensor": torch.randn(shape, dtype=stored)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = torch.full(size, 7.0)
    Slices(tmp_path).fill("tensor", found, first)
    part = tuple(slice(at, at + n) for at, n in zip(first, size, strict=True))
    assert torch.equal(found, tensors["tensor"][part].float())


def test_only_fsdp2_of_several_processes_reads_shards() -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    assert shards_weights(asked)
    for name, other in (
        ("ACCELERATE_USE_FSDP", "false"),
        ("FSDP_VERSION", "1"),
        ("WORLD_SIZE", "1"),
    ):
        assert not shards_weights(asked | {name: other})


def test_noise_on_the_mask_is_measured_once_the_embedding_is_there() -> None:
    model = torch.nn.Embedding(50, 8)
    model.get_input_embeddings = lambda: model
    expected = MaskNoise(model, 3, std=2.0, steps=5)._std
    weight = model.weight
    model.weight = torch.nn.Parameter(weight.to("meta"))
    noise = MaskNoise(model, 3, std=2.0, steps=5)
    assert noise._std == 0
    model.weight = weight
    noise.measure()
    assert noise._std == pytest.approx(expected)
    assert expected > 0
