"""Training: what moves, what stays, what is written, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from factory import FAMILIES
from transformers import AutoTokenizer

from dllm_convert.adapters import get_adapter
from dllm_convert.common.console import Reporter
from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.objective import Objective
from dllm_convert.errors import DllmConvertError
from dllm_convert.modeling.loading import load_model
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.data.text import TextData, prepare_data
from dllm_convert.training.resume import COMPLETE_MARKER, last_whole_checkpoint
from dllm_convert.training.run import train
from dllm_convert.training.setup import make_trainable
from dllm_convert.weights.run import adapt

QUIET = Reporter(quiet=True)


def converted(source: Path, folder: Path, **training: Any) -> tuple[ConversionPlan, TextData]:
    """Write the untrained conversion of a tiny checkpoint and prepare its data."""
    target = (
        "bd3lm"
        if "bd3lm" in get_adapter(inspect_source(str(source)).model_type).targets
        else "mdlm"
    )
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "data": {"source": "pydoc", "sequence_length": 32, "max_documents": 40},
            "training": {
                "steps": 6,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "lr_schedule": "constant_with_warmup",
                "warmup_ratio": 0,
                "lora": {"rank": 4},
                **training,
            },
        }
    )
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan, prepare_data(recipe, AutoTokenizer.from_pretrained(folder), QUIET)


def weights(folder: Path, plan: ConversionPlan) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, plan.adapter).state_dict())


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    "training",
    [
        {"method": "full"},
        {"method": "lora"},
        {"method": "lora", "lora": {"rank": 4, "embeddings": "mask_row"}},
    ],
    ids=["full", "lora", "lora-mask-row"],
)
def test_training_lowers_the_bound(
    family: str, training: dict[str, Any], tmp_path: Path, source_cache: SourceFactory
) -> None:
    tied = family in ("qwen2", "qwen3", "bert", "roberta")
    # 6 steps move BERT by less than the noise of its tokenizer, which trains anew in every process.
    training = {"steps": 24, **training}
    plan, data = converted(source_cache(family, tied=tied), tmp_path / "untrained", **training)
    result = train(
        plan, data, tmp_path / "untrained", tmp_path / "trained", tmp_path / "work", QUIET
    )
    before, after = (load_model(tmp_path / name, plan.adapter) for name in ("untrained", "trained"))
    objective = Objective.from_config(before.config)
    assert result.steps == 24
    first = nelbo(before, data.held_out, objective, seed=0)
    assert nelbo(after, data.held_out, objective, seed=0).nats_per_token < first.nats_per_token
    assert set(before.state_dict()) == set(after.state_dict())
    lines = [
        json.loads(line) for line in (tmp_path / "work/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert all(line["nelbo"] == pytest.approx(line["loss"], rel=1e-4) for line in lines)


def test_the_same_seed_trains_the_same_weights(tmp_path: Path, source_cache: SourceFactory) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a", method="lora")
    for name in ("b", "c"):
        torch.manual_seed(ord(name))
        train(plan, data, tmp_path / "a", tmp_path / name, tmp_path / f"work-{name}", QUIET)
    first, second = weights(tmp_path / "b", plan), weights(tmp_path / "c", plan)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_mask_row_alone(
    tied: bool, tmp_path: Path, source_cache: SourceFactory
) -> None:
    lora = {"rank": 4, "embeddings": "mask_row", "norms": False}
    plan, data = converted(
        source_cache("llama", tied=tied), tmp_path / "a", method="lora", lora=lora
    )
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    before, after = weights(tmp_path / "a", plan), weights(tmp_path / "b", plan)
    name = plan.adapter.embedding
    moved = (before[name] != after[name]).any(-1).nonzero().squeeze(-1).tolist()
    assert moved == [plan.mask.id]
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"],
        after["model.layers.0.self_attn.q_proj.weight"],
    )


def test_embeddings_norms_and_head_train_beside_lora(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    plan, _ = converted(source_cache("llama", tied=False), tmp_path / "a", method="lora")
    model = make_trainable(
        load_model(tmp_path / "a", plan.adapter), plan.adapter, plan.recipe.training
    )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in ("embed_tokens", "lm_head", "input_layernorm", "model.norm", "q_proj.lora_A"):
        assert any(part in name for name in names), part


def test_the_adapter_is_kept_when_asked(source_cache: SourceFactory, tmp_path: Path) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a", method="lora", keep_adapter=True)
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    assert (tmp_path / "b/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    settings = {"method": method, "save_steps": 2, "lora": {"rank": 4, "embeddings": "full"}}
    plan, data = converted(source_cache("llama"), tmp_path / "a", **settings)
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    checkpoints = tmp_path / "work/trainer"
    shutil.rmtree(checkpoints / "checkpoint-6")
    (tmp_path / "work/metrics.jsonl").write_text(
        (tmp_path / "work/metrics.jsonl").read_text() + '{"step": 7, "half a li'
    )
    train(plan, data, tmp_path / "a", tmp_path / "c", tmp_path / "work", QUIET)
    whole, resumed = weights(tmp_path / "b", plan), weights(tmp_path / "c", plan)
    worst = max(float((whole[name] - resumed[name]).abs().max()) for name in whole)
    assert worst < 1e-6
    lines = (tmp_path / "work/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / COMPLETE_MARKER).touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-10" / COMPLETE_MARKER).touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = converted(
        source_cache("llama"), tmp_path / "a", save_steps=1, learning_rate=1e30, max_grad_norm=1e30
    )
    with pytest.raises(
        DllmConvertError, match=r"diverged at step \d+: loss nan.*checkpoint is kept"
    ):
        train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    last = last_whole_checkpoint(tmp_path / "work/trainer")
    assert last is not None
    assert not (tmp_path / "b").exists()


def test_time_runs_out(tmp_path: Path, source_cache: SourceFactory) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a", steps=5000, max_minutes=0.01)
    result = train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    assert result.stopped == "time"
    assert result.device
    assert result.devices == 1
    assert 0 < result.steps < 5000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_the_type_of_the_base(
    dtype: torch.dtype, tmp_path: Path, source_cache: SourceFactory
) -> None:
    from safetensors import safe_open

    plan, data = converted(source_cache("llama", dtype=dtype), tmp_path / "a")
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    with safe_open(tmp_path / "b/model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118


def test_uniform_weights_count_and_clipped_noise(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a", loss_weight="uniform")
    noise = {"draw": "count"}
    recipe = Recipe.model_validate({**plan.recipe.model_dump(), "noise": noise})
    plan = ConversionPlan(**{**vars(plan), "recipe": recipe})
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    lines = [
        json.loads(line) for line in (tmp_path / "work/metrics.jsonl").read_text().splitlines()
    ]
    assert any(abs(line["nelbo"] - line["loss"]) > 1e-3 for line in lines)
