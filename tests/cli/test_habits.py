"""What somebody types without reading: -h, other programs' names, Tab, --json on what is wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dllm_convert.cli import completion
from dllm_convert.cli.app import app
from dllm_convert.cli.guide import GUIDES, OTHER_NAMES, meant
from dllm_convert.errors import IncompatibleError
from dllm_convert.recipe.fields import all_fields
from dllm_convert.recipe.loading import list_recipes, load_recipe

ROOT = Path(__file__).parents[2]
COMMANDS: Any = get_command(app).commands  # type: ignore[attr-defined]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


# Help


def test_every_command_has_a_group_examples_and_a_page() -> None:
    assert set(GUIDES) == set(COMMANDS)
    shown = invoke("-h").output
    for group in {guide.group for guide in GUIDES.values()}:
        assert f"─ {group} ─" in shown
    for name, guide in GUIDES.items():
        assert (ROOT / "docs" / guide.page).is_file(), name


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lm-eval"])
def test_h_is_help_and_ends_with_examples(name: str) -> None:
    short, long = invoke(name, "-h"), invoke(name, "--help")
    assert (short.exit_code, short.output) == (0, long.output)
    foot = " ".join(short.output.split()).rpartition("Examples:")[2]
    assert foot.endswith(f"More: docs/{GUIDES[name].page}")
    for example in GUIDES[name].examples:
        assert example in foot


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lm-eval"])
def test_examples_can_be_typed(name: str) -> None:
    import shlex

    for example in GUIDES[name].examples:
        first, *rest = shlex.split(example)
        assert first == name
        # Parsed, and nothing done.
        COMMANDS[name].make_context(name, rest, resilient_parsing=False).close()


# What was meant


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("convert", "run"),
        ("train", "run"),
        ("eval", "evaluate"),
        ("smaple", "sample"),
        ("qqqq", ""),
    ],
)
def test_a_command_that_is_none_says_which_was_meant(typed: str, near: str) -> None:
    result = invoke(typed, "x")
    assert result.exit_code == 2
    assert (f"Did you mean '{near}'?" in result.stderr) == bool(near)


def test_other_names_are_of_commands_and_no_commands_themselves() -> None:
    assert set(OTHER_NAMES.values()) <= set(COMMANDS)
    assert not set(OTHER_NAMES) & set(COMMANDS)
    assert meant("TRAIN", COMMANDS) == "run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "x/y", "--to", "bd3"], "Did you mean bd3lm?"),
        (["check", "x/y", "--to", "MDLM"], "Did you mean mdlm?"),
        (["run", "x/y", "--serve", "sglan"], "Did you mean sglang?"),
        (["export", "out", "--to", "sdra"], "sdar"),
    ],
)
def test_a_value_that_is_none_says_which_was_meant(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", "").split())


# Exit codes, and one document


WRONG = [
    (["run"], "SOURCE"),
    (["rnu", "x"], "run"),
    (["run", "x/y", "--nonsense"], "--nonsense"),
    (["run", "x/y", "--to", "ddpm"], "ddpm"),
    (["run", "x/y", "--steps", "0"], "0"),
    (["run", "x/y", "--lora", "8", "--full"], "--lora"),
    (["check", "x/y", "--set", "training.stepz=3"], "stepz"),
    (["check", "x/y", "--set", "training.steps=many"], "many"),
    (["check", "x/y", "--preset", "small-bugdet"], "small-budget"),
    (["sample", "x", "--threshold", "1.5"], "--threshold"),
    (["evaluate", "x"], "--tasks"),
]
IDS = [" ".join(arguments) for arguments, _ in WRONG]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=IDS)
def test_what_the_command_line_alone_shows_is_2_and_one_document(
    arguments: list[str], words: str
) -> None:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 2, result.output
    document = json.loads(result.stdout)
    assert document["exit_code"] == 2
    assert words in f"{document['error']['message']} {document['error']['hint']}"
    assert document["error"]["kind"]
    plain = invoke(*arguments)
    assert (plain.exit_code, plain.stdout) == (2, "")


def test_what_a_file_says_is_3(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("source: x/y\ntraining: {stepz: 3}\n")
    with pytest.raises(IncompatibleError) as caught:
        load_recipe(str(tmp_path / "mine.yaml"), overrides={})
    assert caught.value.exit_code == 3


# env


def test_env_says_what_a_bug_report_needs_and_nothing_of_a_person(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    document = json.loads(invoke("env", "--json").stdout)
    for name in ("dllm-convert", "python", "platform", "cpu", "gpus", "packages", "terminal"):
        assert name in document
    assert document["packages"]["torch"]
    text = invoke("env").stdout
    assert "python" in text
    for private in ("hf_abcdefghijkl", str(Path.home()), str(ROOT)):
        assert private not in text + json.dumps(document)


# Tab


def test_tab_offers_recipes_presets_fields_and_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen-mine").mkdir()
    (tmp_path / "qwen.gguf").touch()
    (tmp_path / "qwen.txt").touch()
    assert completion.recipes("") == [entry.name for entry in list_recipes()]
    assert {"qwen3-4b", "qwen-mine/", "qwen.gguf"} <= set(completion.sources("qwen"))
    assert "qwen.txt" not in completion.sources("qwen")
    assert "small-budget" in completion.presets("small")
    assert completion.fields("training.max_") == [
        "training.max_minutes=",
        "training.max_grad_norm=",
    ]
    assert set(completion.fields("")) == {f"{name}=" for name in all_fields()}
    assert "arc_easy,dllm_copy" in completion.tasks("arc_easy,dllm_c")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="extra `tasks`")
def test_tab_knows_the_tasks_that_are_asked_for_most() -> None:
    for name in ("arc_easy", "hellaswag", "gsm8k", "mmlu", "piqa"):
        assert name in completion.tasks(name)


def test_a_shell_asks_and_is_answered_without_torch() -> None:
    asked = {"_DLLM_CONVERT_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    program = (
        "import sys; from dllm_convert.cli.app import app;"
        "sys.argv = ['dllm-convert'];"
        "\ntry: app(prog_name='dllm-convert')\nfinally: print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "/usr/bin:/bin", "COMP_WORDS": "dllm-convert check smollm2-1", **asked},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.split() == ["smollm2-1.7b", "smollm2-135m", "False"], result.stderr


# lm-eval


def test_lm_eval_lists_our_tasks_and_asks_no_git(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval import evaluator

    from dllm_convert.evaluation.names import no_repository

    monkeypatch.chdir(tmp_path)

    def manager(include_path: Any = None, **_: Any) -> Any:
        return SimpleNamespace(list_all_tasks=lambda **_: str(include_path), all_tasks=())

    monkeypatch.setattr(tasks, "TaskManager", manager)
    monkeypatch.setattr(sys, "argv", ["lm-eval"])
    result = invoke("lm-eval", "ls", "tasks")
    assert str(ROOT / "dllm_convert/evaluation/tasks") in result.output, result.exception
    before = evaluator.get_git_commit_hash
    with no_repository():
        assert evaluator.get_git_commit_hash() is None
    assert evaluator.get_git_commit_hash is before
    assert "fatal" not in capfd.readouterr().err
