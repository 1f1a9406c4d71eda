"""What is trained is held in float32, whatever frozen weights are held in: small steps count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from factory import FAMILIES
from test_trainer import QUIET, converted
from torch.distributed.fsdp import MixedPrecisionPolicy

from dllm_convert.modeling.loading import load_model
from dllm_convert.training import setup
from dllm_convert.training.distributed import reduce_in_float32
from dllm_convert.training.run import train
from dllm_convert.training.setup import make_trainable

METHODS = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 4, "embeddings": "full"}},
    "lora-mask-row": {"method": "lora", "lora": {"rank": 4, "embeddings": "mask_row"}},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_that_is_trained_is_float32(
    family: str, method: str, tied: bool, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, _ = converted(source_cache(family, tied=tied), tmp_path / "a", **METHODS[method])
    base = load_model(tmp_path / "a", plan.adapter, dtype=torch.bfloat16)
    model = make_trainable(base, plan.adapter, plan.recipe.training)
    kinds = {weight.requires_grad: weight.dtype for weight in model.parameters()}
    assert kinds[True] == torch.float32
    if method != "full":
        assert kinds[False] == torch.bfloat16
        if tied and method == "lora":
            head = model.get_output_embeddings()
            assert any(head.weight is weight for weight in model.parameters())
            assert head.weight.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_ten_small_steps_move_every_tensor(
    method: str, tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        **METHODS[method], "steps": 10, "learning_rate": 1e-4, "precision": "bf16",
    }  # fmt: skip
    plan, data = converted(source_cache("llama", tied=True), tmp_path / "a", **settings)
    monkeypatch.setattr(setup, "training_dtype", lambda training: torch.bfloat16)
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    after = load_model(tmp_path / "b", plan.adapter).state_dict()
    untrained = load_model(tmp_path / "a", plan.adapter).state_dict()
    # Loading rounds the weights to bfloat16; what is looked for is what the steps added to that.
    start = {name: weight.bfloat16().float() for name, weight in untrained.items()}
    moved = {name: float((after[name] != start[name]).float().mean()) for name in after}
    norms = [share for name, share in moved.items() if name.endswith("norm.weight")]
    if method == "lora-mask-row":
        assert all(moved[name] > 0 for name in moved if "proj" in name or "embed" in name)
    else:
        assert moved["model.embed_tokens.weight"] > 0.9
    assert norms
    assert all(share == 1 for share in norms)


class _State:
    fsdp_plugin: Any = None


class _Accelerator:
    state = _State()


def test_fsdp2_adds_gradients_up_in_float32() -> None:
    class Plugin:
        mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)

    accelerator = _Accelerator()
    reduce_in_float32(accelerator)
    accelerator.state.fsdp_plugin = Plugin()
    reduce_in_float32(accelerator)
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
