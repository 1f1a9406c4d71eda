"""The launch that was asked for: read from configs and environments, and in the plan."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.errors import DataError, DllmConvertError, IncompatibleError, RequestError
from dllm_convert.planning.costs import Memory, peak_memory
from dllm_convert.planning.devices import GPUS
from dllm_convert.planning.estimate import SCALING, estimate_device
from dllm_convert.planning.launch import ALONE, Launch
from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.planning.needs_text import fits_text
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe

CONFIGS = Path(__file__).parents[2] / "recipes/launch"
SHIPPED = {
    "ddp": ("ddp", 0, 8, 1),
    "fsdp2": ("fsdp2", 3, 8, 1),
    "multi-node": ("fsdp2", 3, 16, 2),
    "zero2": ("zero", 2, 8, 1),
    "zero3": ("zero", 3, 8, 1),
}


def facts(launch: Launch) -> tuple[str, int, int, int]:
    return launch.strategy, launch.stage, launch.processes, launch.machines


def test_every_shipped_config_is_known() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_config_is_planned_as_accelerate_starts_it(name: str) -> None:
    """What is read from a config is what a process finds that Accelerate started with it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = CONFIGS / f"{name}.yaml"
    asked = Launch.asked(config=path, environment={})
    assert facts(asked) == SHIPPED[name]
    line = ["--config_file", str(path), "--main_process_port", "0", "--mixed_precision", "no"]
    args = launch_command_parser().parse_args([*line, "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    each = asked.processes // asked.machines
    ranks = {"RANK": "1", "WORLD_SIZE": str(asked.processes), "LOCAL_WORLD_SIZE": str(each)}
    found = Launch.current(environment | ranks)
    assert facts(found) == facts(asked)
    assert found.sharing == asked.sharing


@pytest.mark.parametrize(
    ("settings", "strategy", "stage", "hybrid"),
    [
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, "fsdp2", 2, False),
        ({"fsdp_version": 2}, "fsdp2", 3, False),
        ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "fsdp1", 2, False),
        ({"fsdp_sharding_strategy": 1}, "fsdp1", 3, False),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD"}, "fsdp1", 3, True),
        ({"fsdp_reshard_after_forward": "NO_SHARD"}, "ddp", 0, False),
        ({}, "fsdp1", 3, False),
    ],
)
def test_ways_of_fsdp(
    settings: dict[str, Any], strategy: str, stage: int, hybrid: bool, tmp_path: Path
) -> None:
    path = write(tmp_path, {"distributed_type": "FSDP", "fsdp_config": settings})
    found = Launch.asked(16, path, 2, environment={})
    assert (found.strategy, found.stage, found.hybrid) == (strategy, stage, hybrid)
    shared = 1 if strategy == "ddp" else 8 if hybrid else 16
    assert found.sharing.weights == shared


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_config_of_deepspeeds_own_is_read(tmp_path: Path) -> None:
    own = tmp_path / "ds.json"
    own.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}')
    settings = {"deepspeed_config_file": str(own)}
    path = write(tmp_path, {"distributed_type": "DEEPSPEED", "deepspeed_config": settings})
    found = Launch.asked(4, path, environment={})
    assert (found.stage, found.offload) == (3, ("moments",))
    own.unlink()
    with pytest.raises(DataError, match="no such file"):
        Launch.asked(4, path, environment={})


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (None, DataError, "no such file"),
        ("", DataError, "is empty"),
        ("a: [", IncompatibleError, "config.yaml"),
        ({"distributed_type": "MEGATRON_LM"}, IncompatibleError, "expected MULTI_GPU, FSDP or"),
        ({"distributed_type": "MULTI_CPU"}, IncompatibleError, "--num-processes N without"),
        ({"distributed_type": "FSDP", "num_processes": "8"}, IncompatibleError, "num_processes"),
        ({"distributed_type": "FSDP", "num_machines": 0}, IncompatibleError, "num_machines is 0"),
        ({"distributed_type": "FSDP", "fsdp_config": 3}, IncompatibleError, "expected a section"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 7}},
            IncompatibleError,
            "expected 0 to 3",
        ),
        (
            {"distributed_type": "FSDP", "parallelism_config": {"tp_size": 2}},
            IncompatibleError,
            "parallelism_config",
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 9, "num_machines": 2},
            RequestError,
            "9 processes cannot be shared out over 2 machines",
        ),
    ],
)
def test_a_config_that_cannot_be_planned(
    content: Any, kind: type[DllmConvertError], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml" if content is None else write(tmp_path, content)
    with pytest.raises(kind, match=re.escape(said)):
        Launch.asked(config=path, environment={})


def test_one_process_is_alone() -> None:
    assert Launch.asked(environment={}) == Launch.asked(1, environment={}) == ALONE
    with pytest.raises(RequestError, match="num_machines"):
        Launch.asked(machines=2, environment={})


SIZE = 7_500_000_000
ZERO_PAPER = ModelShape(
    **{"embedding": 0, "head": 0, "layer_parameters": SIZE, "other": 0, "tied": True},
    **{"vocabulary": 1000, "hidden": 4096, "layers": 32, "queries": 4096, "heads": 32},
    **{"matrices": float(SIZE), "outputs": 1e6, "stored_matrices": SIZE, "adapted": 0},
    **{"adapted_matrices": 0, "adapted_outputs": 0.0, "norms": 0},
)


def on_64(strategy: str, stage: int) -> Memory:
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm"})
    sharing = Launch(64, 8, strategy, stage).sharing
    return peak_memory(ZERO_PAPER, recipe, gpu=True, bf16=True, flex=True, sharing=sharing)


@pytest.mark.parametrize(
    ("strategy", "stage", "gigabytes"),
    # ZeRO, arXiv 1910.02054, figure 1: 7.5B parameters on 64 devices.
    [("ddp", 0, 120), ("zero", 1, 31.4), ("zero", 2, 16.6), ("zero", 3, 1.9), ("fsdp2", 3, 1.9)],
)
def test_states_are_those_of_the_paper(strategy: str, stage: int, gigabytes: float) -> None:
    found = on_64(strategy, stage)
    states = found.weights + found.gradients + found.moments
    assert states / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_what_is_exchanged_is_counted() -> None:
    # DDP's buckets are as large as the gradients; FSDP gathers two layers, or keeps all weights.
    assert on_64("ddp", 0).exchanged == 4 * SIZE
    assert on_64("fsdp2", 3).exchanged == 2 * 2 * SIZE // 32
    assert on_64("fsdp2", 2).exchanged == 2 * SIZE
    assert on_64("none", 0).exchanged == 0
    offloaded = Launch(64, 8, "fsdp2", 3, offload=("weights", "moments")).sharing
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm"})
    found = peak_memory(ZERO_PAPER, recipe, gpu=True, bf16=True, flex=True, sharing=offloaded)
    assert found.weights == found.gradients == found.moments == 0


def test_several_are_faster_by_their_number_and_an_assumption() -> None:
    recipe = load_recipe("fast-dllm-v2-or-any/model", overrides={}, preset="fast-dllm-v2")
    one = estimate_device(ZERO_PAPER, recipe, GPUS[0])
    many = estimate_device(ZERO_PAPER, recipe, GPUS[0], launch=Launch(16, 2, "fsdp2", 3))
    assert one.fits is False
    assert many.fits is True
    assert many.tokens == 16 * one.tokens, "these steps were made for one process"
    assert many.hours == pytest.approx(one.hours / SCALING, rel=0.01)


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch(2, 1, "ddp"), "needs FSDP2"),
        (Launch(8, 1, "fsdp2", 3), "yes"),
        (Launch(8, 1, "zero", 2), "yes"),
        (ALONE, "2 needed"),
    ],
)
def test_what_does_not_fit_says_what_would(launch: Launch, said: str) -> None:
    recipe = load_recipe("any/model", overrides={}, preset="fast-dllm-v2")
    found = asdict(estimate_device(ZERO_PAPER, recipe, GPUS[0], launch=launch))
    assert fits_text(found).startswith(said)
    assert (found["memory"] <= found["room"]) == (said == "yes")


def check(*arguments: str) -> tuple[dict[str, Any], str]:
    shown = []
    for more in (["--json"], []):
        result = CliRunner().invoke(app, ["check", *arguments, *more])
        assert result.exit_code == 0, result.output
        shown.append(result.stdout)
    return json.loads(shown[0]), " ".join(shown[1].split())


@pytest.fixture
def source(source_cache: SourceFactory) -> str:
    return str(source_cache("llama"))


SMALL = ("--set", "data.sequence_length=64", "--data", "pydoc", "--allow-epochs", "--to", "mdlm")


@pytest.mark.parametrize("processes", [1, 2, 16, 24])
def test_a_budget_of_tokens_is_kept(processes: int, source: str) -> None:
    preset = ("--preset", "single-gpu", *SMALL)
    plan, text = check(source, *preset, "--num-processes", str(processes))
    budget = plan["training"]["tokens"]
    per_step = 32 * processes * 64
    assert plan["training"]["steps"] == math.ceil(budget / per_step)
    assert budget <= plan["training_tokens"] < budget + per_step
    assert plan["estimate"]["tokens"] == plan["text"]["wanted"] == plan["training_tokens"]
    if processes == 1:
        assert "launch" not in plan
        return
    assert plan["launch"]["sequences_per_step"] == 32 * processes
    assert f"{processes} processes (DDP), {32 * processes:,} sequences per step" in text
    assert "the budget is in tokens" in text
    scaled = plan["training"]["learning_rate"] * math.sqrt(processes)
    assert f"the learning rate stays {plan['training']['learning_rate']:g}" in text
    assert plan["launch"]["learning_rate_by_square_root"] == pytest.approx(scaled, rel=0.05)
    keeps = "--global-batch 32 keeps batch, steps and rate" in text
    assert keeps == (not 32 % processes)  # 24 cannot share 32 alike


def test_a_batch_that_cannot_be_kept_is_not_advised(source: str) -> None:
    _, text = check(source, *SMALL, "--steps", "2", "--num-processes", "8")
    assert "the learning rate stays" in text
    assert "--global-batch" not in text


def test_blocks_grow_within_what_a_budget_comes_to(source: str) -> None:
    given = {"to": "bd3lm", "block": 16, "data": "pydoc", "tokens": 4096, "allow_epochs": True}
    growth = {"training.block_growth.steps": 20, "data.sequence_length": 64}
    fits = dc.plan(source, **given, overrides={**growth, "training.batch_size": 1})
    assert fits.recipe.training.steps == 64
    with pytest.raises(IncompatibleError, match="comes to 8 steps, and blocks would grow for 20"):
        dc.plan(source, **given, overrides={**growth, "training.batch_size": 1}, processes=8)


def test_a_config_of_one_process_starts_no_others(tmp_path: Path) -> None:
    path = write(tmp_path, {"distributed_type": "NO"})
    assert Launch.asked(config=path, environment={}).processes == 1
    with pytest.raises(IncompatibleError, match="starts one process, not 4"):
        Launch.asked(4, path, environment={})


def test_a_global_batch_keeps_steps_and_rate(source: str) -> None:
    preset = ("--preset", "single-gpu", *SMALL, "--global-batch", "32")
    alone, _ = check(source, *preset)
    plan, text = check(source, *preset, "--num-processes", "16")
    assert plan["training"]["steps"] == alone["training"]["steps"]
    assert "32 sequences per step" in text
    assert "the learning rate stays" not in text


def test_a_recipe_of_steps_says_what_becomes_of_them(source: str) -> None:
    plan, text = check(source, *SMALL, "--steps", "10", "--num-processes", "4")
    assert plan["training_tokens"] == 10 * 4 * 2 * 64
    assert "the recipe says 10 steps, whatever one reads: together they read 5,120 tokens" in text


def test_the_plan_is_that_of_the_config(source: str) -> None:
    options = (*SMALL, "--steps", "10", "--launch-config", str(CONFIGS / "multi-node.yaml"))
    plan, text = check(source, *options)
    assert plan["launch"]["name"] == "FSDP2"
    assert "Peak memory of each of 16 processes on 2 machines (FSDP2)" in text
    assert f"several devices keep {SCALING} of their speed" in text
    ways = {row["strategy"]: row for row in plan["estimate"]["strategies"]}
    assert list(ways) == ["DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert [name for name, row in ways.items() if row["asked"]] == ["FSDP2"]
    assert ways["FSDP2"]["moments"] == math.ceil(ways["DDP"]["moments"] / 16)
    by_hand = CliRunner().invoke(app, ["run", source, *options, "--dry-run", "--json"])
    assert json.loads(by_hand.stdout)["launch"] == plan["launch"]


def test_both_doors_plan_the_same(source: str, tmp_path: Path) -> None:
    config = CONFIGS / "zero3.yaml"
    overrides = {"data.sequence_length": 64}
    asked: dict[str, Any] = {"to": "mdlm", "tokens": "64k", "allow_epochs": True}
    asked |= {"overrides": overrides, "processes": 4}
    plan = dc.plan(source, **asked, launch_config=config)
    assert plan.launch == Launch(4, 1, "zero", 3, config=str(config))
    assert plan.recipe.training.steps == math.ceil(64_000 / (4 * 2 * 64))
    again = dc.plan(plan, overrides={"training.batch_size": 4})
    assert again.launch == plan.launch
    assert again.recipe.training.steps == math.ceil(64_000 / (4 * 4 * 64))
    alone = dc.plan(again, processes=1, launch_config=None)
    assert alone.launch == ALONE
    assert alone.recipe.training.steps == math.ceil(64_000 / (4 * 64))


def test_a_resolved_recipe_keeps_its_budget(source: str, tmp_path: Path) -> None:
    """What a run of 16 writes down reads as many tokens in one process."""
    from dllm_convert.recipe.loading import dump_recipe

    asked: dict[str, Any] = {"to": "mdlm", "tokens": "64k"}
    sixteen = dc.load_recipe(source, **asked, processes=16)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(sixteen))
    alone = dc.load_recipe(path)
    assert alone.training.tokens == 64_000
    assert alone.training.steps == dc.load_recipe(source, **asked).training.steps
    assert dc.load_recipe(path, steps=7).training.tokens is None
