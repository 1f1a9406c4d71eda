"""Every field of the objective, through the Trainer; how a step is split changes nothing."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from test_trainer import QUIET, weights
from transformers import AutoTokenizer

from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.prediction import predict
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_model
from dllm_convert.pipeline.run import run
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe, Training
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.data.mask_noise import MaskNoise
from dllm_convert.training.data.text import TextData, prepare_data
from dllm_convert.training.run import train
from dllm_convert.training.setup import make_trainable, require_devices, transplant
from dllm_convert.weights.run import adapt

FIELDS: dict[str, dict[str, Any]] = {
    "cosine": {"noise.schedule": "cosine"},
    "polynomial": {"noise.schedule": "polynomial", "noise.power": 1.5},
    "clipped-uniform-weight": {
        "noise.min_time": 0.3,
        "noise.max_time": 0.8,
        "training.loss_weight": "uniform",
    },
    "discrete": {"noise.discrete_steps": 16},
    "kernel-uniform": {"noise.kernel": "uniform", "noise.discrete_steps": 8},
    "kernel-uniform-views": {
        "noise.kernel": "uniform",
        "noise.discrete_steps": 8,
        "noise.views": 2,
    },
    "kernel-neighbours": {
        "noise.kernel": "neighbours",
        "noise.discrete_steps": 8,
        "noise.neighbours": 4,
        "noise.jumps": 2.0,
    },
    "learned": {"noise.schedule": "learned", "noise.classes": 4, "noise.exponent_rate": 0.05},
    "learned-views": {
        "noise.schedule": "learned",
        "noise.classes": 3,
        "noise.exponent_rate": 0.05,
        "noise.views": 2,
    },
    "count": {"noise.draw": "count"},
    "position-bias": {"noise.position_bias": 0.3},
    "views": {"noise.views": 3, "noise.draw": "count"},
    "complementary": {"noise.complementary": True},
    "complementary-uniform-weight": {
        "noise.complementary": True,
        "training.loss_weight": "uniform",
    },
    "annealing": {"training.attention_annealing_steps": 10},
    "mask-noise": {"training.mask_noise_std": 1.0, "training.mask_noise_steps": 10},
    "ar-loss": {"training.ar_loss_weight": 0.5},
    "confidence": {"training.confidence_loss_weight": 0.5, "noise.views": 2},
    "growth": {"training.block_growth": {"steps": 5}},
    "drop-shift": {"token_shift": "drop"},
    "full-checkpointing": {"training.gradient_checkpointing": "full"},
    "eager": {"training.attention": "eager"},
}


def converted(
    source: Path, folder: Path, target: str = "bd3lm", **fields: Any
) -> tuple[ConversionPlan, TextData]:
    """Write the untrained conversion of a tiny checkpoint and prepare its data."""
    recipe: dict[str, Any] = {
        "source": str(source),
        "target": target,
        "block_size": 8 if target == "bd3lm" else None,
        "data": {"source": "pydoc", "sequence_length": 32, "max_documents": 40},
        "noise": {},
        "training": {
            "steps": 24,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "lr_schedule": "constant_with_warmup",
            "warmup_ratio": 0,
        },
    }
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        (recipe[section] if section else recipe)[field] = value
    plan = make_plan(Recipe.model_validate(recipe), inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan, prepare_data(plan.recipe, AutoTokenizer.from_pretrained(folder), QUIET)


def curve(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (n, t)
        for n in FIELDS
        for t in ("bd3lm", "mdlm")
        if t == "bd3lm" or n not in ("ar-loss", "growth")
    ],
)
def test_every_objective_lowers_its_bound(
    name: str, target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a", target, **FIELDS[name])
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    before, after = (load_model(tmp_path / folder, plan.adapter) for folder in "ab")
    objective = Objective.from_config(after.config)
    first, last = (nelbo(m, data.held_out, objective, seed=0, draws=2) for m in (before, after))
    assert last.nats_per_token < first.nats_per_token - 3 * last.stderr / 10
    lines = curve(tmp_path / "work")
    assert len(lines) == 24
    assert all(torch.isfinite(torch.tensor(line["nelbo"])) for line in lines)


SPLITS = [
    "count",
    "views",
    "complementary-uniform-weight",
    "annealing",
    "mask-noise",
    "ar-loss",
    "growth",
    "confidence",
    "learned",
]


@pytest.mark.parametrize("name", SPLITS)
def test_how_a_step_is_split_changes_nothing(
    name: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    results = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        folder = tmp_path / f"{size}"
        split = {"training.batch_size": size, "training.gradient_accumulation": parts}
        fields = {**FIELDS[name], **split, "training.steps": 6, "training.learning_rate": 1e-3}
        plan, data = converted(source_cache("llama"), folder / "a", **fields)
        train(plan, data, folder / "a", folder / "b", folder / "work", QUIET)
        results.append((curve(folder / "work"), weights(folder / "b", plan)))
    (whole, final), *others = results
    for lines, other in others:
        for line, expected in zip(lines, whole, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=2e-5)
            assert line["nelbo"] == pytest.approx(expected["nelbo"], rel=2e-5)
        assert max(float((final[key] - other[key]).abs().max()) for key in final) < 1e-4


@pytest.mark.parametrize("how", ["selective", "full"])
def test_checkpointing_changes_no_gradient(
    how: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    results = []
    for chosen in ("off", how):
        folder = tmp_path / chosen
        fields = {"training.gradient_checkpointing": chosen, "training.steps": 4}
        plan, data = converted(source_cache("qwen3"), folder / "a", **fields)
        train(plan, data, folder / "a", folder / "b", folder / "work", QUIET)
        results.append(weights(folder / "b", plan))
    assert max(float((results[0][key] - results[1][key]).abs().max()) for key in results[0]) < 1e-5


def test_mask_noise_moves_the_mask_alone_and_fades(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, _ = converted(source_cache("llama"), tmp_path / "a")
    model = load_model(tmp_path / "a", plan.adapter)
    noise = MaskNoise(model, plan.mask.id, std=2.0, steps=4)
    embedding = model.get_input_embeddings()
    tokens = torch.tensor([[plan.mask.id, 1, plan.mask.id, 2]])
    plain = embedding(tokens)
    sizes = []
    for step in range(6):
        with noise.at(NoiseKey(0, step, 0, 1), Fraction(step)):
            moved = embedding(tokens) - plain
        assert (moved[0, [1, 3]] == 0).all()
        sizes.append(float((moved[0, [0, 2]].std() / embedding.weight.std()).detach()))
    assert torch.equal(embedding(tokens), plain)
    assert sizes[0] == pytest.approx(2.0, rel=0.3)
    assert sizes[4:] == [0, 0]
    assert 0 < sizes[3] < sizes[1]


@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
def test_eager_attention_trains_the_same(
    target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    curves = []
    for chosen in ("sdpa", "eager"):
        folder = tmp_path / chosen
        fields = {"training.attention": chosen, "training.steps": 4}
        plan, data = converted(source_cache("llama"), folder / "a", target, **fields)
        train(plan, data, folder / "a", folder / "b", folder / "work", QUIET)
        curves.append([line["loss"] for line in curve(folder / "work")])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_qlora_is_refused_without_a_gpu(tmp_path: Path, source_cache: SourceFactory) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    lora = {"rank": 4, "quantize": "nf4"}
    fields = {"training.method": "lora", "training.lora": lora}
    plan, _ = converted(source_cache("llama"), tmp_path / "a", **fields)
    with pytest.raises(IncompatibleError, match="needs a CUDA GPU") as caught:
        require_devices(plan.recipe.training)
    assert "Leave it out" in (caught.value.hint or "")
    with pytest.raises(IncompatibleError, match="needs a CUDA GPU"):
        run(plan.recipe, tmp_path / "out", QUIET)
    require_devices(Training(method="full", lora=plan.recipe.training.lora))


@torch.no_grad()
def test_flex_attention_sees_what_sdpa_sees(tmp_path: Path, source_cache: SourceFactory) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a")
    results = []
    for name in ("sdpa", "flex_attention"):
        model = load_model(tmp_path / "a", plan.adapter, attention=name)
        objective, batch = Objective.from_config(model.config), data.held_out[0]
        process = ForwardProcess(draw="count")
        views = corrupt(batch, objective, process, NoiseKey(0, 0, 0, len(batch.tokens)))
        forward = predict(batch, views, objective)
        assert forward.mask is not None
        mask = forward.mask.dense() if name == "sdpa" else forward.mask.block_mask()
        logits = model(**forward.inputs, attention_mask=mask, use_cache=False).logits
        results.append(forward.nats(logits, objective))
    assert torch.allclose(results[0], results[1], atol=1e-4)


def test_flex_attention_is_refused_without_a_gpu(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    plan, _ = converted(source_cache("llama"), tmp_path / "a", **{"training.attention": "flex"})
    with pytest.raises(IncompatibleError, match="no backward of it on a CPU"):
        run(plan.recipe, tmp_path / "out", QUIET)


def test_an_adapter_moves_to_a_base_in_full_precision(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    fields = {"training.method": "lora", "training.lora": {"rank": 4}}
    plan, _ = converted(source_cache("llama", tied=True), tmp_path / "a", **fields)

    def made(seed: int) -> Any:
        torch.manual_seed(seed)
        base = load_model(tmp_path / "a", plan.adapter)
        return make_trainable(base, plan.adapter, plan.recipe.training)

    trained, fresh, same = made(0), made(1), made(0)
    with torch.no_grad():
        for mine, theirs in zip(trained.parameters(), same.parameters(), strict=True):
            if mine.requires_grad:
                change = torch.randn_like(mine) / 10
                mine.add_(change)
                theirs.add_(change)
            else:
                # Where a quantised base differs; it is not to move along.
                mine.add_(1.0)
    expected = same.merge_and_unload().state_dict()
    moved = transplant(trained, fresh).merge_and_unload().state_dict()
    assert moved.keys() == expected.keys()
    assert max(float((moved[name] - expected[name]).abs().max()) for name in moved) < 1e-6
