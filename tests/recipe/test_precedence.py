"""Nothing beats what was typed: layers, fields that overlap, and what cannot be obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.recipe.budget import parse_count, parse_minutes
from dllm_convert.recipe.fields import all_fields
from dllm_convert.recipe.loading import data_dir, load_recipe
from dllm_convert.recipe.precedence import FORGOTTEN

PRESETS = sorted(path.stem for path in (data_dir("recipes") / "presets").glob("*.yaml"))


def field(recipe: Any, path: str) -> Any:
    value = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_pair_names_fields() -> None:
    known = set(all_fields())
    assert {*FORGOTTEN, *(narrow for narrows in FORGOTTEN.values() for narrow in narrows)} <= known


def test_a_typed_learning_rate_and_typed_steps_hold() -> None:
    typed = {"training.method": "lora", "training.learning_rate": 2e-4, "training.steps": 2000}
    training = load_recipe("some/model", overrides=typed).training
    assert training.peak_learning_rate == 2e-4
    assert training.max_minutes is None
    both = typed | {"training.lora.learning_rate": 5e-4, "training.max_minutes": 7}
    training = load_recipe("some/model", overrides=both).training
    assert (training.peak_learning_rate, training.max_minutes) == (5e-4, 7)
    training = load_recipe("some/model", overrides={"training.method": "lora"}).training
    assert (training.peak_learning_rate, training.max_minutes) == (1e-3, 2.5)


@pytest.mark.parametrize("broad", sorted(FORGOTTEN))
@pytest.mark.parametrize("later", ["file", "flag"])
def test_a_later_broader_field_beats_an_earlier_narrower_one(
    broad: str, later: str, tmp_path: Path
) -> None:
    values: dict[str, tuple[Any, Any]] = {
        "source": ("a/b", "c/d"),
        "revision": ("v1", None),
        "license": ("mit", None),
        "parameters": (1000, None),
        "training.learning_rate": (1e-5, 3e-4),
        "training.lora.learning_rate": (1e-3, None),
        "training.steps": (10, 20),
        # Steps of 4 sequences of 256 tokens.
        "training.tokens": (20 * 1024, 10 * 1024),
        "training.max_minutes": (1.0, None),
        "training.lora.rank": (64, 8),
        "training.lora.alpha": (128, None),
        "noise.schedule": ("polynomial", "cosine"),
        "noise.power": (3.0, 2.0),
        "mask_token.token": ("<m>", "<n>"),
        "mask_token.id": (3, None),
        "data.source": ("a/texts", "b/texts"),
        "data.subset": ("en", None),
        "data.split": ("train_sft", "train"),
        "data.revision": ("v1", None),
        "data.containing": ("python", None),
        "data.held_out_source": ("c/texts", "d/texts"),
        "data.held_out_split": ("test", None),
        "generation.max_denoising_steps": (8, 4),
        "generation.confidence_threshold": (0.9, None),
        "generation.entropy_bound": (0.1, None),
        "generation.remasking": ("random", "low_confidence"),
        "generation.remasking_ratio": (0.2, None),
    }
    # A mixture goes with none of the others; test_texts.py has it.
    narrows = [narrow for narrow in FORGOTTEN[broad] if narrow != "data.mixture"]
    first = {path: values[path][0] for path in {"source", *narrows, broad}}
    base = tmp_path / "base.yaml"
    base.write_text(json.dumps({"target": "mdlm", **first}), encoding="utf-8")
    new = values[broad][1] if values[broad][1] is not None else 0.5
    new = 5 if broad == "mask_token.id" else new
    if later == "file":
        recipe = load_recipe(
            write(tmp_path, json.dumps({"inherits": "base.yaml", broad: new})), overrides={}
        )
    else:
        recipe = load_recipe(str(base), overrides={broad: new})
    assert field(recipe, broad) == new
    # One of two that say the same is gone, or follows from the other.
    other = {"mask_token.token": None, "mask_token.id": None}
    other |= {"training.tokens": None, "training.steps": 10}
    expected = [other.get(n, values[n][1]) for n in narrows]
    assert [field(recipe, narrow) for narrow in narrows] == expected
    said = {broad: new} | {narrow: values[narrow][0] for narrow in narrows}
    recipe = load_recipe(str(base), overrides=said)
    assert all(field(recipe, path) == value for path, value in said.items())


def test_the_same_data_named_again_keeps_its_subset(tmp_path: Path) -> None:
    path = write(
        tmp_path, "source: a/b\ntarget: mdlm\ndata: {source: a/texts, subset: en, split: train_sft}"
    )
    for source, subset, split in (("a/texts", "en", "train_sft"), ("b/texts", None, "train")):
        data = load_recipe(path, overrides={"data.source": source}).data
        assert (data.subset, data.split) == (subset, split)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_that_is_typed_beats_the_file(preset: str, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "source: a/b\ninherits: single-gpu\nblock_size: 64\ntraining: {steps: 3, batch_size: 7}",
    )
    from_file = load_recipe(path, overrides={}, preset=preset)
    alone = load_recipe("a/b", overrides={}, preset=preset)
    assert from_file.training.steps == alone.training.steps != 3
    assert from_file.block_size == (64 if preset == "single-gpu" else alone.block_size)
    assert from_file.training.batch_size == alone.training.batch_size
    assert from_file.source == alone.source == "a/b"
    # How long blocks grow has to be less than that.
    fewer: dict[str, Any] = {"training.steps": 5}
    fewer |= {"training.block_growth.steps": 3} if alone.growing_sizes else {}
    over = load_recipe(path, overrides=fewer, preset=preset)
    assert over.training.steps == 5
    assert over.training.max_minutes is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("5M", 5_000_000), ("1.5B", 1_500_000_000), ("200k", 200_000), ("300_000", 300_000), ("7", 7)],
)
def test_tokens_as_they_are_typed(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90m", 90), ("2h", 120), ("1h30m", 90), ("45s", 0.75), ("1d", 1440), ("1.5 h", 90)],
)
def test_times_as_they_are_typed(text: str, minutes: float) -> None:
    assert parse_minutes(text) == minutes


def check(source: Path, *options: str) -> Any:
    result = CliRunner().invoke(app, ["check", str(source), "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_budgets_are_what_the_plan_shows(source_cache: SourceFactory) -> None:
    source = source_cache("llama")
    options = ("--to", "mdlm", "--set", "data.sequence_length=64", "--allow-epochs")
    plan = check(source, *options, "--tokens", "1M")
    assert plan["training"]["steps"] == -(-1_000_000 // (2 * 64))
    assert plan["training"]["max_minutes"] is None
    plan = check(source, *options, "--tokens", "1M", "--global-batch", "12", "--num-processes", "2")
    training = plan["training"]
    assert training["batch_size"] * training["gradient_accumulation"] * 2 == 12
    assert training["batch_size"] == 2
    assert training["steps"] == -(-1_000_000 // (12 * 64))
    training = check(source, *options, "--global-batch", "9")["training"]
    assert (training["batch_size"], training["gradient_accumulation"]) == (1, 9)
    training = check(source, *options, "--max-time", "90m")["training"]
    assert (training["max_minutes"], training["steps"]) == (90, 60)
    training = check(source, *options, "--steps", "2000")["training"]
    assert (training["max_minutes"], training["steps"]) == (None, 2000)
    training = check(source, *options, "--steps", "2000", "--max-time", "2h")["training"]
    assert (training["max_minutes"], training["steps"]) == (120, 2000)
    typed = ("--lora", "64", "--set", "training.learning_rate=2e-4")
    training = check(source, *options, *typed)["training"]
    assert training["lora"]["learning_rate"] is None
    assert training["learning_rate"] == 2e-4
    assert (
        check(source, "--preset", "sdar", "--set", "data.sequence_length=64", "--allow-epochs")[
            "block_size"
        ]
        == 4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "5", "--tokens", "5M"], "one of --tokens and --steps"),
        (["--tokens", "5M", "--set", "training.steps=3"], "one of --tokens and"),
        (["--max-time", "1h", "--set", "training.max_minutes=3"], "one of --max-time and"),
        (["--global-batch", "8", "--set", "training.gradient_accumulation=3"], "--global-batch"),
        (["--global-batch", "8", "--set", "training.batch_size=3"], "no multiple of"),
        (["--global-batch", "7", "--num-processes", "2"], "cannot be shared"),
        (["--steps", "5", "--set", "training.steps=6"], "contradicts another option"),
        (["--to", "mdlm", "--set", "target=bd3lm"], "contradicts another option"),
        (["--tokens", "many"], "no number of tokens"),
        (["--tokens", "0"], "no number of tokens"),
        (["--max-time", "90"], "is no time"),
        (["--max-time", "0m"], "is no time"),
        (["--steps", "5", "--no-train"], "would change nothing"),
        (["--max-time", "5m", "--no-train"], "would change nothing"),
        (
            ["--keep-adapter"],
            "--keep-adapter would change nothing: the training method is",
        ),
        (["--keep-base"], "--keep-base (training.lora.acts_on) would change nothing"),
        (["--keep-base"], "add --lora"),
        (["--full", "--set", "training.lora.rank=8"], "add --lora"),
        (["--set", "noise.power=3"], "noise.schedule=polynomial"),
        (["--full", "--set", "training.lora.learning_rate=1e-3"], "add --lora"),
        (["--full", "--set", "training={lora: {alpha: 8}}"], "add --lora"),
        (["--global-batch", "8", "--no-train"], "would change nothing"),
        (["--no-train", "--set", "training.batch_size=2"], "would change nothing"),
        (["--set", "training.steps=5", "--set", "training.steps=6"], "given twice"),
        (["--steps", "5", "--set", "training={steps: 6}"], "contradicts another option"),
        (["--set", "source=elsewhere"], "contradicts SOURCE"),
        (["--report-to", "wandb", "--set", "training.report_to=[tensorboard]"], '["wandb"]'),
        (["--set", "training.mask_noise_std=1"], "add --set training.mask_noise_steps"),
        (["--set", "training.mask_noise_steps=9"], "add --set training.mask_noise_std"),
        (["--data", "pydoc", "--set", "data.subset=en"], "is no dataset with subsets"),
        (["--set", "data.held_out_source=pydoc", "--set", "data.held_out_fraction=.5"], "nothing"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(
    options: list[str], message: str, source_cache: SourceFactory
) -> None:
    result = CliRunner().invoke(app, ["check", str(source_cache("llama")), *options])
    assert result.exit_code == 2, result.output
    assert message.replace(" ", "") in "".join(
        result.output.replace("│", "").split()
    ) or message.replace(" ", "") in "".join(result.stderr.replace("│", "").split())


def test_an_unknown_preset_names_the_nearest(source_cache: SourceFactory) -> None:
    result = CliRunner().invoke(app, ["check", str(source_cache("llama")), "--preset", "sdarr"])
    assert result.exit_code == 2
    assert "nearest: sdar" in result.output + result.stderr


def test_a_field_said_twice_alike_is_no_contradiction(source_cache: SourceFactory) -> None:
    twice = ("--set", "training.steps=5", "--set", "training.steps=5", "--steps", "5")
    plan = check(source_cache("llama"), "--to", "mdlm", *twice)
    assert plan["training"]["steps"] == 5


def test_a_recipe_may_have_another_source(source_cache: SourceFactory, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("source: nobody/nothing\ntarget: mdlm\n", encoding="utf-8")
    source = source_cache("llama")
    assert check(recipe, "--set", f"source={source}")["source"]["given"] == str(source)
