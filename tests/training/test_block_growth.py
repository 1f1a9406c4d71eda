"""Blocks that grow: at every step the loss is that of a training with blocks of that size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from moved import trainer_of
from test_distillation import QUIET, WAYS, prepared, rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.diffusion.corruption import Corruption, NoiseKey
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.growth import BlockGrowth, Timetable, faded
from dllm_convert.training.resume import checkpoint_step, last_whole_checkpoint
from dllm_convert.training.run import train
from dllm_convert.training.trainer import DiffusionTrainer
from dllm_convert.weights.run import adapt

SIZES = {"full": (1, 2, 4, 16), "lora": (1, 4), "gated": (2, 4, 16)}
NOISE = {"draw": "count", "complementary": True}


def conversion(
    source: Path, folder: Path, way: str = "full", block: int = 8, *, steps: int = 20, **fields: Any
) -> ConversionPlan:
    """A conversion that grows over 4 steps of each size; with other blocks it does not grow."""
    sizes = SIZES[way]
    training = {
        "steps": steps, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
        "lr_schedule": "constant_with_warmup", "warmup_ratio": 0, **WAYS[way],
        **fields.pop("training", {}),
    }  # fmt: skip
    if block == 8:
        training["block_growth"] = {"steps": 4 * len(sizes), "sizes": list(sizes)}
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": "bd3lm",
            "block_size": block,
            "noise": fields.pop("noise", NOISE),
            "data": {"source": "pydoc", "sequence_length": 48, "max_documents": 40},
            "training": training,
            **fields,
        }
    )
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan


def step(trainer: DiffusionTrainer, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of an optimizer step."""
    trainer.state.global_step = number
    trainer.model.zero_grad()
    (inputs,), _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    found = {
        name: weight.grad.clone()
        for name, weight in trainer.model.named_parameters()
        if weight.grad is not None
    }
    return loss.detach(), found


OBJECTIVES: dict[str, dict[str, Any]] = {
    "count": {},
    "time-views": {"noise": {"views": 2}},
    "uniform-kernel": {"noise": {"kernel": "uniform", "discrete_steps": 8}},
    "ar-loss": {"training": {"ar_loss_weight": 0.5}},
    "drop-shift": {"token_shift": "drop"},
    "taught": {"training": {"distillation": {"weight": 0.5}}},
}


@pytest.mark.parametrize(
    ("way", "objective"),
    [*(("full", name) for name in OBJECTIVES), ("lora", "count"), ("gated", "count"),
     ("gated", "taught")],
)  # fmt: skip
def test_the_loss_of_a_stage_is_that_of_its_blocks(
    way: str, objective: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    source, fields = source_cache("llama"), OBJECTIVES[objective]
    growing = trainer_of(conversion(source, tmp_path / "grown", way, **deep(fields)),
                         tmp_path / "grown")  # fmt: skip
    sizes = SIZES[way]
    for stage, size in enumerate((*sizes, 8)):
        if size == 8:  # What comes after all stages has the size of the recipe.
            plan = conversion(source, tmp_path / "last", way, **deep(fields))
            still = (
                replace(
                    plan.recipe.training,
                )
                if False
                else plan.recipe.training
            )
            assert still.block_growth.steps == 4 * stage
            trainer = growing
        else:
            plan = conversion(source, tmp_path / f"{size}", way, size, **deep(fields))
            assert not plan.recipe.growing_sizes
            trainer = trainer_of(plan, tmp_path / f"{size}")
        for number in (4 * stage, 4 * stage + 3):
            loss, gradients = step(growing, number)
            expected, others = step(trainer, number)
            assert torch.equal(loss, expected), (size, number)
            assert gradients.keys() == others.keys()
            assert all(torch.equal(one, others[name]) for name, one in gradients.items())


def deep(fields: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(fields))
    return copy


def test_blocks_of_one_token_are_the_base_itself(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    """The first stage starts at the base's own likelihood, exactly."""
    source = source_cache("llama")
    plan = conversion(source, tmp_path / "a", noise={"draw": "count"}, training={"log_steps": 1})
    data = prepared(plan, tmp_path / "a")
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    lines = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
    assert [line["block_size"] for line in lines] == [
        *([1] * 4), *([2] * 4), *([4] * 4), *([16] * 4), *([8] * 4),
    ]  # fmt: skip
    # The same weights in the stock class, read causally; rows were added to its vocabulary.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32, is_causal=True)
    mask = base.config.diffusion["mask_token_id"]
    nats, count = 0.0, 0
    batch = data.training_rows(start=0, total=2)
    for row in (batch[0], batch[1]):
        ids, segments = torch.from_numpy(row["input_ids"]), torch.from_numpy(row["segment_ids"])
        for document in range(int(segments.max()) + 1):
            inside = ids[segments == document][None]
            with torch.no_grad():
                logits = base(inside).logits[0, :-1].double()
            logits[:, mask] = -torch.inf
            nats -= float(logits.log_softmax(-1).gather(-1, inside[0, 1:, None]).sum())
            count += inside.shape[1] - 1
    assert lines[0]["nelbo"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("way", ["full", "gated"])
def test_a_training_that_is_stopped_while_blocks_grow(
    way: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    source, outcomes = source_cache("llama"), []
    fields = {"save_steps": 3, "keep_checkpoints": 9}
    plan = conversion(source, tmp_path / "a", way, steps=18, training=fields)
    data = prepared(plan, tmp_path / "a")
    for name in ("whole", "resumed"):
        train(plan, data, tmp_path / "a", tmp_path / name, tmp_path / "work", QUIET)
        lines = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
        curve = [(line["loss"], line["nelbo"], line["block_size"]) for line in lines]
        outcomes.append((curve, {f.name: f.read_bytes()
                                 for f in (tmp_path / name).rglob("*.safetensors")}))  # fmt: skip
        if name == "whole":
            for checkpoint in (tmp_path / "work/trainer").glob("checkpoint-*"):
                if checkpoint_step(checkpoint) > 9:
                    shutil.rmtree(checkpoint)
            last = last_whole_checkpoint(tmp_path / "work/trainer")
            assert last is not None and checkpoint_step(last) == 9
    assert outcomes[0] == outcomes[1] and outcomes[0][1]


def test_stages_are_as_long_as_each_other() -> None:
    for sizes, steps, planned in (((1, 2, 4), 12, 40), ((1, 2, 4, 8), 10, 11), ((4,), 7, 8)):
        growth = BlockGrowth(sizes, steps)
        found = [growth.size_at(Fraction(number)) for number in range(planned)]
        assert found[steps:] == [None] * (planned - steps) and None not in found[:steps]
        assert [(size, found.count(size)) for size in sizes] == list(growth.stages())
        lengths = [length for _, length in growth.stages()]
        assert sum(lengths) == steps and max(lengths) - min(lengths) <= 1
        assert found[:steps] == sorted(found[:steps], key=lambda size: sizes.index(size or 0))


def test_a_time_limit_ends_the_growth_with_it() -> None:
    growth, table = BlockGrowth((1, 2, 4), 60), Timetable(100, 15, 50)
    # Found out after 15 steps: 50 there are, of which 30 grow.
    found = [growth.size_at(table.in_plan(number)) for number in range(50)]
    assert found == [1] * 15 + [2] * 5 + [4] * 10 + [None] * 20
    # It does not depend on what was known when a step was taken first.
    assert found[:15] == [growth.size_at(Fraction(number)) for number in range(15)]


def test_what_fades_ends_with_a_time_limit_too() -> None:
    table = Timetable(100, 15, 50)
    # It was to fade over 40 of 100 steps, and does over 20 of 50.
    left = [faded(40, table.in_plan(number)) for number in range(50)]
    assert left[:15] == pytest.approx([1 - number / 40 for number in range(15)])
    assert left[15:20] == pytest.approx([1 - number / 20 for number in range(15, 20)])
    assert not any(left[20:])
    # Nobody said how many steps there were to be, or there is no limit.
    for plain in (Timetable(None, 15, 50), Timetable(100)):
        assert [faded(40, plain.in_plan(n)) for n in (0, 20, 30, 40)] == [1, 0.5, 0.25, 0]
    assert faded(0, Fraction(0)) == 0


def test_the_trainer_is_told_of_a_time_limit(tmp_path: Path, source_cache: SourceFactory) -> None:
    plan = conversion(source_cache("llama"), tmp_path / "a", steps=40)
    trainer = trainer_of(plan, tmp_path / "a")
    assert trainer._noise.objective_at(9).block_size == 4
    trainer.keep_to(5, 20)  # Half of what was planned: stages of two steps.
    assert [trainer._noise.objective_at(number).block_size for number in (4, 5, 6, 7, 8)] == [
        2, 4, 16, 16, 8,
    ]  # fmt: skip


def test_a_trainer_opens_its_attention_in_the_time_there_is(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    fading = {"attention_annealing_steps": 20, "mask_noise_steps": 20, "mask_noise_std": 1.0}
    plan = conversion(source_cache("llama"), tmp_path / "a", block=16, steps=40, training=fading)
    trainer = trainer_of(plan, tmp_path / "a")

    def is_closed(step: int) -> bool:
        return trainer._noise._closed(16, NoiseKey(0, step, 0, 1)) is not None

    assert is_closed(19) and not is_closed(20)
    trainer.keep_to(5, 20)
    assert is_closed(9) and not is_closed(10)


def growing(**fields: Any) -> Recipe:
    known = {"target": "bd3lm", "block_size": 12, "data.sequence_length": 48,
             "training.steps": 50, "training.block_growth.steps": 20}  # fmt: skip
    known |= {name.replace("__", "."): value for name, value in fields.items()}
    return load_recipe("x/y", overrides={k: v for k, v in known.items() if v is not None})


@pytest.mark.parametrize(
    ("block", "sizes"), [(12, (1, 2, 4)), (32, (1, 2, 4, 8, 16)), (6, (1, 2)), (7, (1,))]
)
def test_blocks_double_where_nothing_else_is_said(block: int, sizes: tuple[int, ...]) -> None:
    recipe = growing(block_size=block, data__sequence_length=4 * block)
    assert recipe.growing_sizes == sizes
    kept = {"training.method": "lora", "training.lora.acts_on": "noisy"}
    if sizes != (1,):
        beside = growing(block_size=block, data__sequence_length=4 * block, **kept)
        assert beside.growing_sizes == sizes[1:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "mdlm", "block_size": None}, "mdlm has no blocks"),
        ({"training.method": "none"}, "nothing is trained"),
        ({"noise.draw": "draft", "training.method": "lora", "training.lora.acts_on": "noisy"},
         "drawn beside long ones"),
        ({"block_size": 1}, "no smaller block"),
        ({"training.steps": 20}, "never have their size"),
        ({"training.block_growth.steps": 2}, "a step for each of the sizes 1, 2, 4"),
        ({"training.block_growth.steps": 0, "training.block_growth.sizes": [2]}, "does nothing"),
        ({"training.block_growth.sizes": [5]}, "has 5, which has to divide"),
        ({"training.block_growth.sizes": [8]}, "has 8, which has to divide"),
        ({"training.block_growth.sizes": [96]}, "has 96, which has to divide"),
        ({"training.block_growth.sizes": [1, 4], "training.method": "lora",
          "training.lora.acts_on": "noisy"}, "nothing to train"),
        ({"training.block_growth.sizes": ["1"]}, "list of integers"),
    ],
)  # fmt: skip
def test_what_cannot_grow_is_refused_with_the_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        growing(**fields)
    assert message in str(caught.value), caught.value


def test_check_says_the_stages(source_cache: SourceFactory) -> None:
    fields = ("training.block_growth.steps=20", "training.block_growth.sizes=[1,4,32,8]")
    line = ["check", str(source_cache("llama")), "--to", "bd3lm", "--block", "16", "--steps", "40",
            *(word for field in fields for word in ("--set", field))]  # fmt: skip
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0, shown.output
    assert "blocks of 1, 4, 32, 8 tokens for 20 steps, then of 16" in " ".join(shown.output.split())
    plan = json.loads(CliRunner().invoke(app, [*line, "--json"]).output)
    assert plan["growing_sizes"] == [1, 4, 32, 8]


def test_a_view_without_a_mask_trains_nothing_and_breaks_nothing(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    """The complement of a block of one masked token is empty."""
    plan = conversion(source_cache("llama"), tmp_path / "a")
    trainer = trainer_of(plan, tmp_path / "a")
    trainer.state.global_step = 0
    (inputs,), _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    views: tuple[Corruption, ...] = inputs["noise"].views
    first, complement = views
    assert first.scored.any() and not (first.scored & complement.scored).any()
    loss, _ = step(trainer, 0)
    assert loss.isfinite() and loss > 0
