"""Learning from the base: its own predictions are what is learnt, in every way of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from moved import trainer_of
from safetensors.torch import load_file
from test_gated_training import texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.diffusion.distillation import Lesson
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.data.text import TextData, prepare_data
from dllm_convert.training.run import train
from dllm_convert.weights.run import adapt

QUIET = Reporter(quiet=True)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WAYS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 4}},
    "mask-row": {"method": "lora", "lora": {"rank": 4, "embeddings": "mask_row"}},
    "gated": {"method": "lora", "lora": {"rank": 4, "acts_on": "noisy"}},
    "drafts": {"method": "lora", "lora": {"rank": 4, "acts_on": "noisy"}},
}


def conversion(
    source: Path,
    folder: Path,
    way: str = "full",
    target: str = "bd3lm",
    *,
    more: dict[str, Any] | None = None,
    draft: str | None = None,
    **distillation: Any,
) -> ConversionPlan:
    training = {
        "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
        "lr_schedule": "constant_with_warmup", "warmup_ratio": 0,
        "distillation": {"weight": 0.5, **distillation}, **WAYS[way], **(more or {}),
    }  # fmt: skip
    noise = {"draw": "draft"} if way == "drafts" else {"draw": "count", "complementary": True}
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "noise": noise,
            "data": {"source": "pydoc", "sequence_length": 32, "max_documents": 40},
            "training": training,
            "block_attention": draft or "auto",
        }
    )
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan


def prepared(plan: ConversionPlan, folder: Path) -> TextData:
    return prepare_data(plan.recipe, AutoTokenizer.from_pretrained(folder), QUIET)


def rows() -> dict[str, torch.Tensor]:
    batch = texts()
    assert batch.loss is not None
    return {
        "input_ids": batch.tokens,
        "segment_ids": batch.segments,
        "position_ids": batch.positions,
        "loss_mask": batch.loss,
    }


@torch.no_grad()
def base_predictions(source: Path, views: tuple[Corruption, ...]) -> torch.Tensor:
    """What transformers' own class predicts, document by document, at what the views score."""
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    batch = texts()
    logits = torch.zeros(*batch.tokens.shape, base.config.vocab_size)
    for row in range(len(batch.tokens)):
        for document in batch.segments[row].unique().tolist():
            inside = batch.segments[row] == document
            if document >= 0:
                logits[row, inside] = base(batch.tokens[row, inside][None]).logits[0]
    _, row, at = torch.stack([view.scored for view in views]).nonzero(as_tuple=True)
    return logits[row, at - 1]


@pytest.mark.parametrize(
    ("family", "way", "target"),
    [
        *((family, way, "bd3lm") for family in FAMILIES for way in WAYS),
        *(("llama", way, "mdlm") for way in ("full", "lora", "mask-row")),
    ],
)
def test_the_lesson_is_what_the_base_predicts(
    family: str,
    way: str,
    target: str,
    tmp_path: Path,
    source_cache: SourceFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the stock class over the untouched source, whatever was trained since."""
    source = source_cache(family, tied=family in ("qwen2", "llama"))
    plan = conversion(source, tmp_path / "c", way, target)
    trainer = trainer_of(plan, tmp_path / "c")
    model = trainer.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    batches, _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    noise = batches[0]["noise"]
    lessons: list[Lesson] = []
    lay_out = trainer._lay_out

    def kept(*given: Any) -> Any:
        found = lay_out(*given)
        assert found[2] is not None
        lessons.append(found[2])
        return found

    monkeypatch.setattr(trainer, "_lay_out", kept)
    model.train()
    prepared_model = trainer.accelerator.prepare_model(model)
    loss = trainer.training_step(prepared_model, batches[0])
    assert loss.isfinite()
    # A gated base has predicted the first token of each block, which nobody has to learn.
    views, block = noise.views, plan.recipe.block_size or 0
    if way == "gated":
        first = noise.batch.positions % block == 0
        views = tuple(Corruption(view.scored & ~first, view.weight) for view in views)
    expected = base_predictions(source, views)
    (lesson,) = lessons
    logits = lesson.of(slice(0, len(lesson))).states[:, : expected.shape[1]]
    assert len(lesson) == len(expected) > 20
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    # And it left everything as it was.
    assert model.training
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    assert not lesson.states.requires_grad


@pytest.mark.parametrize("way", ["full", "lora", "gated"])
def test_a_model_that_shares_its_weights_learns_the_same(
    way: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    """Where a head is whole only while it runs, logits are kept in the place of hidden states."""
    plan = conversion(source_cache("llama"), tmp_path / "c", way, top_k=12)
    losses = []
    for sharded in (False, True):
        trainer = trainer_of(plan, tmp_path / "c")
        assert trainer._teacher is not None
        trainer._teacher._sharded = sharded
        batches, _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
        model = trainer.accelerator.prepare_model(trainer.model)
        losses.append(float(trainer.training_step(model, batches[0])))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_it_comes_nearer_to_its_base(way: str, tmp_path: Path, source_cache: SourceFactory) -> None:
    plan = conversion(source_cache("qwen2"), tmp_path / "c", way, weight=1.0)
    data = prepared(plan, tmp_path / "c")
    train(plan, data, tmp_path / "c", tmp_path / "t", tmp_path / "w", QUIET)
    lines = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    apart = [line["divergence"] for line in lines]
    assert len(apart) == 6 and min(apart[-2:]) < apart[0]
    # With weight 1 the loss is the divergence alone, weighed as the bound weighs its tokens.
    assert all(line["loss"] > 0 for line in lines)


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    for way in ("full", "lora"):
        plan = conversion(source_cache("llama"), tmp_path / way, way)
        data = prepared(plan, tmp_path / way)
        work = tmp_path / f"{way}-work"
        train(plan, data, tmp_path / way, tmp_path / f"{way}-one", work, QUIET)
        whole = (work / "metrics.jsonl").read_text()
        one = load_file(tmp_path / f"{way}-one/model.safetensors")
        again = plan.recipe.training.model_copy(update={"save_steps": 3})
        recipe = plan.recipe.model_copy(update={"training": again})
        plan = make_plan(recipe, plan.source)
        part = tmp_path / f"{way}-part"
        train(plan, data, tmp_path / way, tmp_path / f"{way}-two", part, QUIET)
        for path in (part / "trainer").glob("checkpoint-6"):
            shutil.rmtree(path)
        train(plan, data, tmp_path / way, tmp_path / f"{way}-three", part, QUIET)
        other = load_file(tmp_path / f"{way}-three/model.safetensors")
        assert all(torch.equal(one[name], other[name]) for name in one)
        losses = [json.loads(line)["loss"] for line in whole.splitlines()]
        resumed = (part / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in resumed] == losses


FIELD = "training.distillation"
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "an encoder": (("bert", "mdlm", f"{FIELD}.weight=0.5"), "reads both sides of every token"),
    "the uniform kernel": (
        ("llama", "bd3lm", f"{FIELD}.weight=0.5", "noise.kernel=uniform",
         "noise.discrete_steps=100", "noise.draw=time", "noise.complementary=false"),
        "noise.kernel do not go together",
    ),
    "no bound": (
        ("llama", "bd3lm", f"{FIELD}.weight=0.5", f"{FIELD}.divergence=reverse_kl",
         f"{FIELD}.top_k=5"),
        "gives a word no chance",
    ),
    "nothing": (
        ("llama", "bd3lm", f"{FIELD}.weight=0", f"{FIELD}.top_k=5"),
        "does nothing while",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taught_is_refused_beforehand(
    case: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    (family, target, *more), said = REFUSED[case]
    block = ["--block", "8"] if target == "bd3lm" else []
    sets = [part for one in more for part in ("--set", one)]
    line = ["check", str(source_cache(family)), "--to", target, *block, *sets]
    result = CliRunner().invoke(app, line)
    assert result.exit_code in (2, 3), result.output
    assert said in " ".join(result.output.split())


def test_the_plan_counts_the_teacher(source_cache: SourceFactory) -> None:
    from dllm_convert.planning.costs import flops_per_token, peak_memory

    source = inspect_source(str(source_cache("llama")))

    def of(way: str, weight: float) -> tuple[Any, float]:
        recipe = Recipe.model_validate(
            {
                "source": "x",
                "target": "bd3lm",
                "block_size": 8,
                "data": {"sequence_length": 32},
                "training": {"distillation": {"weight": weight}, **WAYS[way]},
            }
        )
        shape = make_plan(recipe, source).shape
        assert shape is not None
        memory = peak_memory(shape, recipe, gpu=True, bf16=True, flex=True)
        return (shape, memory), flops_per_token(shape, recipe, sparse=True)

    for way in ("full", "lora", "gated"):
        (shape, without), cheap = of(way, 0.0)
        (_, memory), dear = of(way, 0.5)
        copy = 2 * shape.parameters if way == "full" else 0
        assert memory.teacher == copy and memory.total == without.total + copy
        assert 1.0 < dear / cheap < 1.6
        if way == "gated":
            assert dear - cheap == pytest.approx(2 * shape.vocabulary_matrix * 0.5 * 7 / 8, rel=0.3)
