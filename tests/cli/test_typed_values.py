"""What is typed names something and can be meant: no empty path, no number beyond reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.counts import LARGEST_COUNT, LARGEST_SEED, LARGEST_TOKENS
from dllm_convert.errors import IncompatibleError
from dllm_convert.recipe.fields import all_fields
from dllm_convert.recipe.loading import load_recipe

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
PLACES = {"SOURCE", "CHECKPOINT", "DIR", "FILE", "FILE.html", "SPEC", "REPO_ID", "BASE", "REV",
          "BRANCH"}  # fmt: skip
NUMBERS = {"N", "R", "K"}
OTHER = {"--tokens", "--remasking-ratio"}  # A text such as 5M, and a share.


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def taking(metavars: set[str]) -> list[tuple[str, str]]:
    """Return command and option, or metavar of the argument, of whatever takes such a value."""
    return [
        (name, one.opts[0] if one.param_type_name == "option" else one.metavar)
        for name, command in COMMANDS.items()
        for one in command.params
        if one.metavar in metavars and one.opts[0] not in OTHER
    ]


def given(name: str, place: str, value: str) -> list[str]:
    command = COMMANDS[name]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    values = [value if one.metavar == place else "some/model" for one in arguments]
    return [name, *values, *([] if place in PLACES else [f"{place}={value}"])]


def test_every_path_and_whole_number_is_read_by_the_rule() -> None:
    read = 0
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            kind, *notes = get_args(hint) or (hint,)
            if notes and re.search(r"Path|\bint\b", str(kind)):
                assert any(getattr(note, "parser", None) for note in notes), name
                read += 1
    assert read >= 30


@pytest.mark.parametrize(("name", "place"), taking(PLACES))
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_name_is_refused(name: str, place: str, value: str) -> None:
    result = invoke(*given(name, place, value))
    assert result.exit_code == 2
    assert "names nothing" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(("name", "option"), taking(NUMBERS))
@pytest.mark.parametrize("value", ["9" * 23, "9" * 5000, "-1", "1.5", "many", "2147483648000"])
def test_a_number_beyond_reason_is_refused(name: str, option: str, value: str) -> None:
    result = invoke(*given(name, option, value))
    assert result.exit_code == 2
    assert "no whole number" in " ".join(result.stderr.replace("│", " ").split())
    assert len(result.stderr) < 1000


TIMES = {"noise.draw": "time", "noise.complementary": False}
BESIDE: dict[str, dict[str, Any]] = {
    "noise.classes": {**TIMES, "noise.schedule": "learned", "noise.exponent_rate": 0.01},
    "noise.neighbours": {
        **{**TIMES, "noise.kernel": "neighbours", "noise.jumps": 4.0, "noise.discrete_steps": 9},
    },
    "block_size": {"data.sequence_length": LARGEST_COUNT},
    "data.sequence_length": {"block_size": 1},
    "noise.discrete_steps": {"noise.complementary": False, "noise.draw": "time"},
    "generation.top_k": {"generation.temperature": 1.0},
    "generation.block_length": {"target": "mdlm"},
    "training.tokens": {"training.gradient_accumulation": LARGEST_COUNT},
    "training.distillation.top_k": {"training.distillation.weight": 0.5},
    **{
        f"data.write_with_base.{name}": {"data.write_with_base.prompts": 9}
        for name in ("prompt_tokens", "max_new_tokens", "batch_size")
    },
}
"""What the largest value of a field needs beside it."""


@pytest.mark.parametrize(
    "field",
    [
        path
        for path, one in all_fields().items()
        if "integer" in one.allowed and "list" not in one.allowed
    ],
)
def test_no_whole_number_of_a_recipe_is_beyond_reason(field: str) -> None:
    own = {"training.seed": LARGEST_SEED}
    own |= dict.fromkeys(("training.tokens", "parameters"), LARGEST_TOKENS)
    largest = own.get(field, LARGEST_COUNT)
    # These are below another number that has this limit.
    below = ("training.block_growth.steps",
             "training.on_policy.prompt_tokens", "training.on_policy.new_tokens")  # fmt: skip
    if field not in below:
        load_recipe("some/model", overrides={field: largest, **BESIDE.get(field, {})})
    for value in (largest + 1, 2 * 10**18, 10**23):
        with pytest.raises(IncompatibleError, match=f"{field} is {value}, .*at most {largest:,}"):
            load_recipe("some/model", overrides={field: value})


@pytest.mark.parametrize(
    "field", [path for path, one in all_fields().items() if "not empty" in one.allowed]
)
@pytest.mark.parametrize("value", ["", " \t"])
def test_no_path_or_id_of_a_recipe_is_empty(field: str, value: str) -> None:
    with pytest.raises(IncompatibleError, match=f"{field} is .*expected text that is not empty"):
        load_recipe("some/model", overrides={field: value})


@pytest.mark.parametrize("value", [LARGEST_COUNT, 1e300, -1e300, 5e-324])
def test_a_plan_of_numbers_that_a_recipe_takes_is_shown(value: float, source_cache: Any) -> None:
    source = str(source_cache("llama"))
    for path, one in all_fields().items():
        words = "integer" if isinstance(value, int) else "number"
        if words in one.allowed:
            result = invoke("check", source, "--set", f"{path}={value}", "--set", "target=bd3lm")
            assert result.exit_code in (0, 2, 3), (path, result.exception)


def test_tokens_that_take_too_many_steps_are_refused(tmp_path: Path) -> None:
    result = invoke("check", str(tmp_path), "--tokens", "900000T")
    assert result.exit_code == 2
    assert "steps" in result.stderr


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("out", [".", "out", "../linked/out", ".."])
def test_an_output_in_the_source_is_refused_before_anything_is_written(
    command: str, out: str, source_factory: Any, tmp_path: Path
) -> None:
    source = source_factory("llama")
    (tmp_path / "linked").symlink_to(source)
    before = sorted(path.name for path in source.rglob("*"))
    result = invoke(command, str(source), "--no-train", "--out", str(source / out))
    assert result.exit_code == 2
    assert "--out" in result.stderr
    assert sorted(path.name for path in source.rglob("*")) == before


def test_the_default_output_of_the_folder_one_stands_in_is_refused_with_another_place(
    source_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_factory("llama")
    monkeypatch.chdir(source)
    result = invoke("run", ".", "--no-train")
    assert result.exit_code == 2
    assert "beside it" in " ".join(result.stderr.replace("│", " ").split())
    assert not (source / f"{source.name}-bd3lm").exists()


@pytest.mark.parametrize(
    "given",
    [
        ["qwen9"],
        ["./nothere"],
        ["no/where.yaml"],
        ["some/model", "--preset", "nope"],
        ["some/model", "--to", "mdlm", "--block", "32"],
        ["some/model", "--set", "training.stepz=1"],
    ],
)
def test_what_the_command_line_alone_shows_to_be_wrong_ends_with_2(given: list[str]) -> None:
    assert invoke("check", *given).exit_code == 2


def test_an_empty_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("")
    result = invoke("check", str(path))
    assert result.exit_code == 3
    assert "mine.yaml: the field source is missing" in " ".join(result.stderr.split())


def worded() -> list[tuple[str, str]]:
    """Return command and option of whatever takes one of some words."""
    return [
        (name, one.opts[0])
        for name, command in COMMANDS.items()
        for one in command.params
        if one.param_type_name == "option" and (one.metavar or "").islower()
    ]


def test_options_of_words_are_found() -> None:
    assert {("sample", "--sampler"), ("chat", "--unmasking"), ("run", "--to")} <= {*worded()}


@pytest.mark.parametrize(("name", "option"), worded())
def test_a_word_that_is_none_is_answered_with_those_there_are(name: str, option: str) -> None:
    (metavar,) = (one.metavar for one in COMMANDS[name].params if option in one.opts)
    found = invoke(*given(name, option, "confidance"))
    said = re.sub(r"[\s│]+", " ", found.output)
    assert found.exit_code == 2, found.output
    assert "is none of" in said, said
    assert all(word in said for word in metavar.split("|")), said


@pytest.mark.parametrize(("name", "option"), worded())
def test_a_shell_is_offered_the_words(name: str, option: str) -> None:
    (metavar,) = (one.metavar for one in COMMANDS[name].params if option in one.opts)
    asked = {
        "_DLLM_CONVERT_COMPLETE": "complete_bash",
        "COMP_WORDS": f"dllm-convert {name} x {option} ",
        "COMP_CWORD": "4",
    }
    found = CliRunner().invoke(app, [], env=asked, prog_name="dllm-convert")
    assert found.stdout.split() == metavar.split("|")


@pytest.mark.parametrize(
    ("more", "said"),
    [([], "add --lossless"), (["--lossless", "--verify-with", "base"], "leave one out")],
)
def test_who_verifies_is_named_where_something_is_verified(more: list[str], said: str) -> None:
    found = invoke("sample", "out", "--base", "some/model", *more)
    assert found.exit_code == 2
    assert said in re.sub(r"[\s│]+", " ", found.output), found.output
