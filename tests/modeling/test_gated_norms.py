"""Norm weights of noisy tokens' own, beside a base that stays: scaled there and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import generic
import pytest
import torch
import transformers
from conftest import SourceFactory
from gated import ADAPTER, BLOCK, FAMILIES, gated_folder
from safetensors.torch import load_file, save_file

from dllm_convert.errors import DllmConvertError
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.modeling.published.gated import gated_norms
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.costs import trainable_parameters
from dllm_convert.recipe.loading import load_recipe

SCALE = "noisy_scale"
NORMS: dict[str, Any] = {
    "training": {
        "method": "lora",
        "lora": {"rank": 4, "acts_on": "noisy", "noisy_norms": True},
        "precision": "fp32",
    }
}


def folder_of(source: Path, folder: Path, **more: Any) -> ConversionPlan:
    return gated_folder(source, folder, **NORMS, **more)


def texts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(5, 380, (rows, length), generator=torch.Generator().manual_seed(0))


def only_norms(folder: Path) -> dict[str, torch.Tensor]:
    """Leave of an adapter what scales norms; return that by the names of the norms."""
    states = load_file(folder / ADAPTER)
    for name, value in states.items():
        if not name.endswith(SCALE):
            value.zero_()
    save_file(states, folder / ADAPTER, {"format": "pt"})
    start, end = len("base_model.model."), -len(SCALE) - 1
    return {name[start:end]: value for name, value in states.items() if name.endswith(SCALE)}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_norm_with_other_weights_for_noisy_tokens_alone(
    family: str, source_cache: SourceFactory, tmp_path: Path
) -> None:
    plan = folder_of(source_cache(family), tmp_path / "g", draft="causal")
    scales = only_norms(tmp_path / "g")
    model = load_checkpoint(tmp_path / "g").model
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "g").eval()
    assert len(scales) == 2 * base.config.num_hidden_layers + 1
    other = copy.deepcopy(base)
    with torch.no_grad():
        for name, scale in scales.items():
            other.get_submodule(name).weight.mul_(1 + scale)
        ids = texts(2, 2 * BLOCK)
        plain = base(ids).logits
        assert torch.equal(model(ids).logits, plain)
        # A first block that is noisy throughout sees nothing that is clean.
        noisy = torch.ones(2, BLOCK, dtype=torch.bool)
        found = model(ids[:, :BLOCK], noisy=noisy).logits
        torch.testing.assert_close(found, other(ids[:, :BLOCK]).logits, atol=1e-4, rtol=1e-4)
        assert (found - plain[:, :BLOCK]).abs().max() > 1e-2
        behind = (torch.arange(2 * BLOCK) >= BLOCK).expand(2, -1)
        both = model(ids, noisy=behind).logits
        torch.testing.assert_close(both[:, :BLOCK], plain[:, :BLOCK], atol=1e-5, rtol=0)
        assert (both[:, BLOCK:] - plain[:, BLOCK:]).abs().amax((0, 2)).min() > 1e-3
    written_files = load_file(tmp_path / "g" / ADAPTER)
    assert plan.shape is not None
    trained = trainable_parameters(plan.shape, plan.recipe.training)
    assert trained == sum(value.numel() for value in written_files.values())


def test_without_it_nothing_of_a_norm_is_in_the_adapter(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    plan = gated_folder(source_cache("llama"), tmp_path / "g")
    assert not any(name.endswith(SCALE) for name in load_file(tmp_path / "g" / ADAPTER))
    assert "adapter_norms" not in plan.config_updates["diffusion"]


def test_only_a_base_that_stays_has_noisy_tokens_with_their_own() -> None:
    given = {"target": "bd3lm", "block_size": 8, "training.method": "lora"}
    with pytest.raises(DllmConvertError, match="beside a base that stays"):
        load_recipe("smollm2-135m", overrides={**given, "training.lora.noisy_norms": True})


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "gemma3_text"])
def test_the_plan_counts_what_is_trained_behind_a_cache(
    family: str, generic_source: SourceFactory, tmp_path: Path
) -> None:
    source = generic_source(family)
    plan = folder_of(source, tmp_path / "g", measured=generic.measured(source).require())
    states = load_file(tmp_path / "g" / ADAPTER)
    assert plan.shape is not None
    trained = trainable_parameters(plan.shape, plan.recipe.training)
    assert trained == sum(value.numel() for value in states.values())
    loaded = load_checkpoint(tmp_path / "g").model
    names = plan.config_updates["diffusion"]["adapter_norms"]
    width = loaded.get_input_embeddings().embedding_dim
    assert len(gated_norms(loaded, names, width)) == sum(n.endswith(SCALE) for n in states)
