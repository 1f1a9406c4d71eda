"""Hours of a recipe from the size of its base alone, and the table that shows them."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from benchmarks.gpu.models import SIZES, shape_of
from dllm_convert.cli.app import app
from dllm_convert.planning.devices import GPUS
from dllm_convert.planning.estimate import estimate_device
from dllm_convert.planning.rough import rough_hours
from dllm_convert.recipe.loading import list_recipes, load_recipe
from dllm_convert.recipe.schema import Gpu, Recipe

ENTRIES = list_recipes()
RECIPES = ("qwen2.5-1.5b", "llama-3.1-8b", "bert-base-uncased", "qwen3.5-2b")


def test_devices_are_those_of_the_plan() -> None:
    assert get_args(Gpu) == tuple(gpu.name for gpu in GPUS)


@pytest.mark.parametrize("size", ["135M", "1.5B", "7B"])
@pytest.mark.parametrize("name", RECIPES)
def test_rough_hours_are_about_those_of_the_headers(name: str, size: str) -> None:
    assert size in SIZES
    shape = shape_of(size)
    recipe = load_recipe(name, overrides={"parameters": shape.parameters})
    device = next(gpu for gpu in GPUS if gpu.name == recipe.device)
    # What is computed again on a small device is the plan's to find out.
    off = recipe.training.model_copy(update={"gradient_checkpointing": "off"})
    recipe = recipe.model_copy(update={"training": off})
    exact = estimate_device(shape, recipe, device).hours
    assert rough_hours(recipe) == pytest.approx(exact, rel=1 / 3)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_recipe_says_what_it_takes(entry: Any) -> None:
    assert entry.presets
    assert entry.recipe.parameters
    assert entry.recipe.device
    assert entry.recipe.training.tokens == entry.recipe.training_tokens
    hours = rough_hours(entry.recipe)
    assert hours is not None and 0.01 < hours < 24


def test_the_name_says_the_size() -> None:
    """A figure of the name, such as 1.5b, is that of the field within a quarter."""
    for entry in ENTRIES:
        figure = entry.name.rpartition("-")[2].removeprefix("e")
        unit = {"b": 1e9, "m": 1e6}.get(figure[-1])
        if unit and figure[:-1].replace(".", "").isdigit():
            assert entry.recipe.parameters == pytest.approx(float(figure[:-1]) * unit, rel=1 / 4)


def test_what_is_not_known_is_not_said() -> None:
    known: dict[str, Any] = {"source": "x", "target": "mdlm", "parameters": 10**9}
    assert rough_hours(Recipe.model_validate(known)) is None
    known["device"] = "H100 80GB"
    assert rough_hours(Recipe.model_validate({**known, "training": {"method": "none"}})) is None
    whole = rough_hours(Recipe.model_validate(known))
    limited = rough_hours(Recipe.model_validate({**known, "training": {"max_minutes": 0.3}}))
    assert whole is not None and limited == 0.005 < whole
    assert rough_hours(Recipe.model_validate({**known, "parameters": None})) is None


def test_both_are_shown_and_decide_nothing() -> None:
    name = "qwen2.5-0.5b"
    shown = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    header, row = shown[0].split(), next(line for line in shown if line.startswith(name))
    assert {"preset", "size", "tokens", "takes"} <= set(header)
    assert all(word in row for word in ("single-gpu", "494M", "32.8M", "min, H100 80GB"))
    document = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)
    found = next(one for one in document if one["name"] == name)
    assert (found["presets"], found["parameters"]) == (["single-gpu"], 494_000_000)
    assert found["hours"] == rough_hours(load_recipe(name, overrides={}))
    other = load_recipe(name, overrides={"parameters": 5, "device": "B200 180GB"})
    assert other.identity() == load_recipe(name, overrides={}).identity()
    # Of another source nothing is known.
    assert load_recipe(name, overrides={"source": "other/model"}).parameters is None
