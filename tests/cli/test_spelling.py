"""What is wrong with a request is said in the words of who made it: flags, or arguments."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.cli.errors import classify, flag
from dllm_convert.errors import RequestError, names_in, spelt
from dllm_convert.pipeline.asked import ConversionRequest
from dllm_convert.publishing import PushOptions
from dllm_convert.recipe.decoding import SETTINGS

PACKAGE = Path(dc.__file__).parent
PAGE = (PACKAGE.parent / "docs/cli.md").read_text(encoding="utf-8")


def requests() -> Iterator[tuple[str, str]]:
    """Yield where a request is refused, with every text of the call."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "RequestError":
                parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                yield where, " ".join(part for part in parts if isinstance(part, str))


def arguments() -> set[str]:
    functions = (
        *(dc.convert, dc.load, dc.sample, dc.verify, dc.evaluate, dc.push, dc.export, dc.serve),
    )
    names = {name for one in functions for name in inspect.signature(one).parameters}
    return (
        names
        | set(ConversionRequest.__annotations__)
        | set(PushOptions.__annotations__)
        | set(SETTINGS)
        | {"source"}
    )


@pytest.mark.parametrize(("where", "text"), requests(), ids=lambda value: str(value)[:40])
def test_arguments_are_named_as_both_doors_have_them(where: str, text: str) -> None:
    assert "--" not in text, f"{where}: a flag, and Python may have asked"
    for name in names_in(text):
        assert name.partition("=")[0] in arguments(), where
        assert f"`{flag(name)}`" in PAGE, where


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("tokens", "--tokens"),
        ("max_time", "--max-time"),
        ("lora=8", "--lora 8"),
        ("train=False", "--no-train"),
        ("overrides", "--set"),
        ("source", "SOURCE"),
    ],
)
def test_an_argument_as_it_is_typed(name: str, typed: str) -> None:
    assert spelt(f"give `{name}` or `--x` or ``", flag) == f"give {typed} or `--x` or ``"


def test_a_request_refused_anywhere_is_told_in_flags() -> None:
    failure = classify(RequestError("give `create_pr`", hint="not `revision`"))
    assert failure is not None
    assert (failure.message, failure.hint) == ("give --create-pr", "not --revision")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "5M", "--steps", "3"], "give one of --tokens and --steps"),
        (["--lora", "4", "--no-train"], "give one of --lora, --full and --no-train"),
        (["--tokens", "5M", "--set", "training.steps=3"], "--tokens and --set training.steps"),
        (["--global-batch", "3", "--num-processes", "2"], "Invalid value for --global-batch"),
        (["--set", "training.lora.rank=3"], "add --lora 3"),
        (["--no-train", "--steps", "3"], "nothing is trained (--no-train, or"),
    ],
)
def test_the_command_line_says_flags(source_cache: Any, options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["check", str(source_cache("llama")), *options])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
