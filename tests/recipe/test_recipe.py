"""Recipes: shipped ones, inheritance, overrides, and what is said of broken ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm_convert.errors import IncompatibleError
from dllm_convert.recipe import yaml_text as recipe_yaml
from dllm_convert.recipe.fields import all_fields
from dllm_convert.recipe.loading import (
    DEFAULT_BLOCK_SIZE,
    data_dir,
    dump_recipe,
    list_recipes,
    load_recipe,
)

NAMES = [entry.name for entry in list_recipes()]
PRESETS = sorted(path.stem for path in (data_dir("recipes") / "presets").glob("*.yaml"))
FILES = sorted(path for path in data_dir("recipes").rglob("*.yaml") if path.parent.name != "launch")


def _write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def _error(source: str, overrides: Mapping[str, Any] | None = None) -> str:
    with pytest.raises(IncompatibleError) as caught:
        load_recipe(source, overrides=overrides or {})
    return str(caught.value)


def test_every_promised_recipe_is_shipped() -> None:
    promised = {
        *(f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b", "7b")),
        *(f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b")),
        *("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"),
        *("mistral-7b-v0.1", "mistral-7b-v0.3"),
        *(f"smollm2-{size}" for size in ("135m", "360m", "1.7b")),
        *(f"qwen3.5-{size}" for size in ("0.8b", "2b", "4b")),
        *("gemma-3-270m", "gemma-4-e2b", "lfm2-350m"),
        *("bert-base-uncased", "bert-large-uncased", "roberta-base", "roberta-large"),
        *("modernbert-base", "modernbert-large"),
    }
    assert set(NAMES) == promised


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_is_complete(name: str) -> None:
    recipe = load_recipe(name, overrides={})
    assert recipe.name == name
    assert recipe.description
    assert recipe.license
    assert recipe.references
    assert recipe.source.count("/") == 1
    if recipe.target == "bd3lm":
        assert recipe.block_size is not None
        assert recipe.data.sequence_length % recipe.block_size == 0
    else:
        assert recipe.block_size is None


@pytest.mark.parametrize("name", PRESETS)
def test_preset_makes_a_recipe(name: str, tmp_path: Path) -> None:
    path = _write(tmp_path, f"inherits: {name}\nsource: ./model\n")
    recipe = load_recipe(path, overrides={})
    assert recipe.references
    assert recipe.name == "mine"
    assert recipe.description is None
    if recipe.block_size is not None:
        assert recipe.data.sequence_length % recipe.block_size == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_is_commented_and_plain_yaml(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert set(yaml.safe_load(text)) <= {"inherits", *(name.split(".")[0] for name in all_fields())}


@pytest.mark.parametrize("name", [*NAMES, "some/model"])
def test_dump_loads_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, overrides={"training.learning_rate": 2e-5, "revision": "1e5"})
    assert load_recipe(_write(tmp_path, dump_recipe(recipe)), overrides={}) == recipe


def test_checkpoint_without_recipe_takes_the_small_budget(tmp_path: Path) -> None:
    for source in ("some/model", "model.gguf", str(tmp_path)):
        recipe = load_recipe(source, overrides={})
        assert recipe.source == source
        assert recipe.name is None
        assert recipe.training.max_minutes is not None


def test_later_presets_win_and_the_file_wins_over_them(tmp_path: Path) -> None:
    _write(tmp_path, "training: {steps: 1, seed: 1, log_steps: 1}\nreferences: [a, b]", "one.yaml")
    _write(tmp_path, "training: {steps: 2, seed: 2}\nreferences: [b, c]", "two.yaml")
    own = "training: {steps: 3}\nreferences: [d]\nsource: x/y\ntarget: mdlm\n"
    path = _write(tmp_path, "inherits: [one.yaml, two.yaml]\n" + own)
    recipe = load_recipe(path, overrides={})
    training = recipe.training
    assert (training.steps, training.seed, training.log_steps) == (3, 2, 1)
    assert recipe.references == ("a", "b", "c", "d")


def test_overrides_win_and_may_be_nested_or_dotted() -> None:
    overrides = {"training.lora.rank": 4, "noise": {"schedule": "cosine"}, "references": ["mine"]}
    recipe = load_recipe("qwen2.5-1.5b", overrides=overrides)
    assert recipe.training.lora.rank == 4
    assert recipe.noise.schedule == "cosine"
    assert recipe.references == ("mine",)


def test_override_empties_a_field() -> None:
    recipe = load_recipe("some/model", overrides={"training.max_minutes": None})
    assert recipe.training.max_minutes is None


def test_block_size_goes_with_its_target() -> None:
    assert load_recipe("qwen2.5-1.5b", overrides={"target": "mdlm"}).block_size is None
    bert = load_recipe("bert-base-uncased", overrides={"target": "bd3lm"})
    assert bert.block_size == DEFAULT_BLOCK_SIZE


def test_empty_section_says_nothing(tmp_path: Path) -> None:
    path = _write(tmp_path, "inherits: mdlm\nsource: x/y\ntraining:\n  # steps: 5\ndata: {}\n")
    assert load_recipe(path, overrides={}).training.steps == 2000


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.learning_rat": 1}, ["training.learning_rat,", "training.learning_rate", "> 0"]),
        ({"learning_rate": 1}, ["learning_rate", "training.learning_rate", "target"]),
        ({"xyzzy": 1}, ["xyzzy", "block_size", "token_shift"]),
        ({"target": "ddpm"}, ['"ddpm"', "mdlm or bd3lm"]),
        ({"training.steps": "8"}, ["training.steps", '"8"', "integer > 0"]),
        ({"training.steps": True}, ["training.steps", "true", "integer > 0"]),
        ({"training.steps": 0}, ["training.steps", "0", "integer > 0"]),
        ({"training.steps": 1.5}, ["training.steps", "1.5", "integer > 0"]),
        ({"training": 5}, ["the command line", "training is 5", "section", "learning_rate"]),
        ({"training.steps.x": 1}, ["the command line", "training.steps", "integer > 0"]),
        ({"noise.max_time": 3}, ["noise.max_time is 3", "> 0 and <= 1"]),
        ({"training.lora.norms": "no"}, ["training.lora.norms", "true or false"]),
        ({"references": "me"}, ["references", "list of texts"]),
        ({"source": None}, ["source is null", "text"]),
        ({"target": "x", "block_size": "y"}, ["and 1 more"]),
    ],
    ids=repr,
)
def test_wrong_field_is_named_with_what_is_allowed(
    overrides: Mapping[str, Any], words: list[str]
) -> None:
    message = _error("qwen2.5-1.5b", overrides)
    for word in words:
        assert word in message


def test_error_names_the_file_that_holds_the_field(tmp_path: Path) -> None:
    _write(tmp_path, "training: {steps: many}\n", "base.yaml")
    path = _write(tmp_path, "inherits: base.yaml\nsource: x/y\ntarget: mdlm\n")
    assert str(tmp_path / "base.yaml") in _error(path)


def test_missing_field_is_named(tmp_path: Path) -> None:
    message = _error(_write(tmp_path, "source: x/y\n"))
    assert "target is missing, expected mdlm or bd3lm" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source: [x", ["line 1"]),
        ("source: x\ntarget: mdlm\n\ttraining:\n", ["line 3"]),
        ("source: x\nsource: y\n", ["line 2", "twice"]),
        ("training: {steps: 1e999}", ["line 1", "finite"]),
        ("? [a]\n: 1\n", ["line 1", "name of a field"]),
        ("- a\n- b\n", ["list", "expected fields"]),
        ("source: \x01", ["not valid YAML"]),
        ("inherits: 5\n", ["inherits is 5", "list of preset names"]),
        ("inherits: [mdml]\n", ["'mdml'", "nearest: mdlm", "Presets:"]),
        ("inherits: other.yaml\n", ["other.yaml"]),
    ],
    ids=repr,
)
def test_broken_file_is_explained(text: str, words: list[str], tmp_path: Path) -> None:
    message = _error(_write(tmp_path, text))
    for word in words:
        assert word in message
    assert "\n" not in message


def test_binary_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in _error(str(path))


def test_cycle_is_named(tmp_path: Path) -> None:
    _write(tmp_path, "inherits: b.yaml", "a.yaml")
    _write(tmp_path, "inherits: a.yaml", "b.yaml")
    assert "a -> b -> a" in _error(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2.5-1.5", ["'qwen2.5-1.5'", "qwen2.5-1.5b", "dllm-convert recipes"]),
        ("Qwen2.5-1.5B", ["nearest: qwen2.5-1.5b"]),
        ("gpt2", ["owner/name"]),
        ("sdar", ["preset", "inherits: sdar"]),
        ("nowhere.yaml", ["no recipe file", "nowhere.yaml"]),
        ("", ["''"]),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, words: list[str]) -> None:
    message = _error(name)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2E+3", 2000.0),
        (".5", 0.5),
        ("010", 10),
        ("true", True),
        ("", None),
        ("~", None),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        (".nan", ".nan"),
        ("'1e-5'", "1e-5"),
        ("[1, 2e-1]", [1, 0.2]),
    ],
)
def test_yaml_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = recipe_yaml.parse_value(text, "--set")
    assert found == value
    assert type(found) is type(value)


def test_dumped_yaml_reads_the_same_under_yaml_1_1() -> None:
    texts = ["1e-5", "no", "1:30", "010", "0x1", "=", "", "~", "true", "ü: x", "a\nb", "1_0", "- x"]
    value = {"texts": texts, "numbers": [1e-5, 1e22, 3, -0.5], "flag": True, "empty": None}
    assert recipe_yaml.parse_mapping(recipe_yaml.dump(value), "x") == value
    assert yaml.safe_load(recipe_yaml.dump(value)) == value


def test_lora_may_have_a_rate_of_its_own() -> None:
    from dllm_convert.recipe.schema import Training

    fields = {"learning_rate": 3e-4, "lora": {"learning_rate": 1e-3}}
    full, lora = (Training.model_validate({**fields, "method": m}) for m in ("full", "lora"))
    assert full.peak_learning_rate == 3e-4
    assert full.learning_rate_field == "training.learning_rate"
    assert lora.peak_learning_rate == 1e-3
    assert lora.learning_rate_field == "training.lora.learning_rate"
    shared = Training.model_validate({"method": "lora", "learning_rate": 2e-4})
    assert shared.peak_learning_rate == 2e-4
    assert shared.learning_rate_field == "training.learning_rate"


def test_a_recipe_file_that_is_spelt_otherwise_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("inherits: mdlm\n")
    for typed in ("mine.yml", "mien.yaml"):
        with pytest.raises(IncompatibleError) as caught:
            load_recipe(str(tmp_path / typed), overrides={})
        assert caught.value.message.endswith(f"{typed}, nearest: mine.yaml")
