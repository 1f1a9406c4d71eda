"""Training beside a base that stays: the same bound in two forwards, and only the adapter moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import generic
import pytest
import torch
from conftest import SourceFactory
from gated import BLOCK, FAMILIES, gated_folder
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.console import Reporter
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.gated import predict_beside_base
from dllm_convert.diffusion.likelihood import autoregressive_nll, nelbo, next_token_nats
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import predict
from dllm_convert.modeling.loading import load_model
from dllm_convert.modeling.published.gated import adapter_parameters
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.training.data.text import TextData, prepare_data
from dllm_convert.training.gated import read_clean
from dllm_convert.training.run import train
from dllm_convert.training.setup import trainable_model

QUIET = Reporter(quiet=True)
NAME = "adapter/adapter_model.safetensors"


def texts() -> TextBatch:
    """Three rows: two documents and padding, one document, one that begins inside nothing."""
    segments = torch.tensor([[0] * 20 + [1] * 27 + [-1], [0] * 48, [0] * 5 + [1] * 40 + [-1] * 3])
    rows = [
        torch.cat([torch.arange(int((row == one).sum())) for one in row.unique_consecutive()])
        for row in segments
    ]
    draws = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 380, segments.shape, generator=draws)
    # Of a chat, what is scored is part of the text.
    loss = torch.ones_like(segments, dtype=torch.bool)
    loss[1, :19] = False
    return TextBatch(tokens, segments, torch.stack(rows), loss)


def plan_of(
    source: Path, folder: Path, filled: bool = True, draft: str = "auto", **training: Any
) -> ConversionPlan:
    lora = {"rank": 4, "acts_on": "noisy"}
    settings = {"method": "lora", "lora": lora, "precision": "fp32", **training}
    return gated_folder(source, folder, filled=filled, draft=draft, training=settings)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


@pytest.mark.parametrize("complementary", [True, False])
@pytest.mark.parametrize(
    ("family", "attention", "again", "draft"),
    [
        *((family, "tiles", "selective", "auto") for family in FAMILIES),
        ("llama", "sdpa", "off", "auto"),
        ("llama", "eager", "full", "causal"),
        ("llama", "tiles", "full", "causal"),
    ],
)
def test_two_forwards_are_one(
    family: str,
    attention: str,
    again: str,
    draft: str,
    complementary: bool,
    tmp_path: Path,
    source_cache: SourceFactory,
) -> None:
    """Losses and gradients of both layouts: the plain one has noisy and clean tokens in a row."""
    # With norms of noisy tokens' own in every other case.
    lora = {"rank": 4, "acts_on": "noisy", "noisy_norms": complementary}
    settings = {"attention": attention, "gradient_checkpointing": again, "lora": lora}
    plan = plan_of(source_cache(family), tmp_path / "g", draft=draft, **settings)
    model = trainable_model(plan, tmp_path / "g").train()
    objective, batch = Objective.from_config(model.config), texts()
    process = ForwardProcess(
        draw="count", complementary=complementary, views=1 if complementary else 2
    )
    views = corrupt(batch, objective, process, NoiseKey(0, 0, 0, 3))

    whole = predict(batch, views, objective)
    logits = model(**whole.inputs, attention_mask=whole.dense_mask(), use_cache=False).logits
    place = torch.cat([view.scored.nonzero() for view in views])
    rest = batch.positions[place[:, 0], place[:, 1]] % BLOCK != 0
    expected = whole.nats(logits, objective)[rest]
    (expected * whole.weight[rest]).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in adapter_parameters(model).items()}
    model.zero_grad()

    reading, forward = predict_beside_base(batch, views, objective)
    states, first, _ = read_clean(model, reading, reading.dense_mask(), objective)
    assert model.training
    logits = model(
        **forward.inputs,
        attention_mask=forward.dense_mask(),
        past_key_values=states,
        use_cache=False,
    ).logits
    nats = forward.nats(logits, objective)
    assert forward.inputs["input_ids"].shape[1] <= len(views) * batch.tokens.shape[1]
    torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward.weight, whole.weight[rest])
    (nats * forward.weight).sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == gradients.keys()
    for name, weight in adapter_parameters(model).items():
        assert weight.grad is not None
        assert relative(weight.grad, gradients[name]) < 1e-4, name
        assert weight.grad.abs().max() > 0, name
    # A block's first token is the base's own prediction.
    model.eval()
    base, _, _ = next_token_nats(model, batch, 384)
    row, at = batch.scorable.nonzero(as_tuple=True)
    begins = batch.positions[row, at] % BLOCK == 0
    torch.testing.assert_close(first.double(), base[begins], atol=1e-5, rtol=1e-5)


def test_blocks_of_one_token_are_the_base(tmp_path: Path, source_cache: SourceFactory) -> None:
    """The bound of a block of one is the likelihood of the base, whatever the adapter is."""
    gated_folder(source_cache("llama"), tmp_path / "g", block_size=1)
    from dllm_convert.adapters import get_adapter

    model = load_model(tmp_path / "g", get_adapter("llama"))
    bound = nelbo(model, [texts()], Objective.from_config(model.config), seed=0)
    exact = autoregressive_nll(model, [texts()], 384)
    assert bound.nats_per_token == pytest.approx(exact.nats_per_token, abs=1e-5)
    assert bound.tokens == exact.tokens


def test_the_bound_counts_first_tokens_as_the_base_does(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    """NLL(first) + NELBO(rest): over many draws both layouts measure the same."""
    plan = plan_of(source_cache("llama"), tmp_path / "g")
    model = load_model(tmp_path / "g", plan.adapter)
    objective, batch = Objective.from_config(model.config), texts()
    draws = 60
    measured = nelbo(model, [batch], objective, seed=0, draws=draws).nats_per_token
    total, process = 0.0, ForwardProcess(draw="count")
    with torch.no_grad():
        for number in range(draws):
            views = corrupt(batch, objective, process, NoiseKey(1, number, 0, 3, "measure"))
            reading, forward = predict_beside_base(batch, views, objective)
            states, first, _ = read_clean(model, reading, reading.dense_mask(), objective)
            logits = model(
                **forward.inputs,
                attention_mask=forward.dense_mask(),
                past_key_values=states,
                use_cache=False,
            ).logits
            nats = forward.nats(logits, objective)
            total += float((nats * forward.weight).sum() + first.sum())
    assert total / draws / int(batch.scorable.sum()) == pytest.approx(measured, rel=0.03)


def rows_of(plan: ConversionPlan, folder: Path) -> TextData:
    return prepare_data(plan.recipe, AutoTokenizer.from_pretrained(folder), QUIET)


SHORT = {
    "steps": 6,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "lr_schedule": "constant_with_warmup",
    "warmup_ratio": 0,
}
DATA = {"source": "pydoc", "sequence_length": 32, "max_documents": 40}


def planned(
    source: Path,
    folder: Path,
    measured: Adapter | None = None,
    norms: bool = False,
    **training: Any,
) -> tuple[ConversionPlan, TextData]:
    lora = {"rank": 4, "acts_on": "noisy", "noisy_norms": norms}
    settings = {"method": "lora", "lora": lora, "precision": "fp32", **SHORT, **training}
    noise = {"draw": "count", "complementary": True}
    plan = gated_folder(
        source, folder, filled=False, training=settings, data=DATA, noise=noise, measured=measured
    )
    return plan, rows_of(plan, folder)


@pytest.mark.parametrize(
    ("family", "norms"), [*((family, False) for family in FAMILIES), ("qwen3", True)]
)
def test_training_lowers_the_bound_and_leaves_the_base(
    family: str, norms: bool, tmp_path: Path, source_cache: SourceFactory
) -> None:
    source = source_cache(family)
    plan, data = planned(source, tmp_path / "a", norms=norms, steps=24)
    result = train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    untrained, trained = (load_model(tmp_path / name, plan.adapter) for name in "ab")
    objective = Objective.from_config(untrained.config)
    before, after = (
        nelbo(model, data.held_out, objective, seed=0).nats_per_token
        for model in (untrained, trained)
    )
    assert after < before
    weights = "model.safetensors"
    assert (tmp_path / "b" / weights).read_bytes() == (source / weights).read_bytes()
    old, new = (load_file(tmp_path / name / NAME) for name in "ab")
    assert result.trainable_parameters == sum(value.numel() for value in new.values())
    assert all(value.dtype == torch.float32 for value in new.values())
    modes = [(tmp_path / "b" / name).stat().st_mode for name in (NAME, "config.json")]
    assert modes[0] == modes[1]
    assert all(not torch.equal(old[name], new[name]) for name in new)
    lines = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
    # First tokens count in the bound and not in the loss.
    assert all(line["nelbo"] > line["loss"] > 0 for line in lines)
    assert lines[0]["nelbo"] == pytest.approx(before, abs=1.0)


@pytest.mark.parametrize(("family", "norms"), [("lfm2", True), ("qwen3_5_text", False)])
def test_behind_a_cache_it_lowers_the_bound_and_goes_on_bit_for_bit(
    family: str, norms: bool, tmp_path: Path, generic_source: SourceFactory
) -> None:
    source = generic_source(family)
    measured = generic.measured(source).require()
    beside = {
        "confidence_loss_weight": 0.1,
        "block_growth": {"steps": 6, "sizes": [2, 4]},
        "distillation": {"weight": 0.4, "top_k": 12},
    }
    plan, data = planned(
        source, tmp_path / "a", measured=measured, norms=norms, steps=12, save_steps=5, **beside
    )
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    models = [load_model(tmp_path / name, plan.adapter) for name in "ab"]
    objective = Objective.from_config(models[0].config)
    assert objective.behind == "cache"
    bounds = [nelbo(one, data.held_out, objective, seed=0).nats_per_token for one in models]
    assert bounds[1] < bounds[0]
    weights = "model.safetensors"
    assert (tmp_path / "b" / weights).read_bytes() == (source / weights).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
    assert all(line["nelbo"] > line["loss"] > 0 for line in lines)
    assert all(line["divergence"] > 0 for line in lines)
    assert [line["block_size"] for line in lines] == [2] * 3 + [4] * 3 + [8] * 6
    assert lines[6]["nelbo"] == pytest.approx(bounds[0], abs=1.5)
    for step in (10, 12):
        shutil.rmtree(tmp_path / f"work/trainer/checkpoint-{step}")
    train(plan, data, tmp_path / "a", tmp_path / "c", tmp_path / "work", QUIET)
    assert (tmp_path / "b" / NAME).read_bytes() == (tmp_path / "c" / NAME).read_bytes()


def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = planned(source_cache("llama"), tmp_path / "a", save_steps=2)
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    kept = tmp_path / "work/trainer/checkpoint-4"
    # The base is not written again and again.
    assert not list(kept.glob("model*"))
    assert (kept / "adapter_model.safetensors").is_file()
    shutil.rmtree(tmp_path / "work/trainer/checkpoint-6")
    train(plan, data, tmp_path / "a", tmp_path / "c", tmp_path / "work", QUIET)
    assert (tmp_path / "b" / NAME).read_bytes() == (tmp_path / "c" / NAME).read_bytes()


def test_what_is_trained_is_float32_over_a_base_in_bfloat16(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    source = source_cache("llama", dtype=torch.bfloat16)
    plan, data = planned(source, tmp_path / "a")
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    weights = "model.safetensors"
    assert (tmp_path / "b" / weights).read_bytes() == (source / weights).read_bytes()
    assert {value.dtype for value in load_file(tmp_path / "b" / NAME).values()} == {torch.float32}
