"""Before anybody trains a plan says which engines could serve what comes of it, and it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from conversion import convert
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.planning.layouts.registry import reachable
from dllm_convert.planning.servable import servable
from dllm_convert.serving.run import read_converted

CASES: dict[str, dict[str, Any]] = {
    "drop": {"token_shift": "drop"},
    "keep": {"token_shift": "keep"},
    "mdlm": {"target": "mdlm", "token_shift": "drop"},
}
WHOLE_TEXTS = "it is bd3lm, and llama-diffusion-cli lets every token see the whole text"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "bert"])
def test_a_plan_says_of_engines_what_its_conversion_says(
    family: str, case: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    fields = {"target": "bd3lm", **CASES[case]}
    if family == "bert":
        fields = {"target": "mdlm"}
    plan = convert(source_cache(family), tmp_path / "a", **fields)
    converted, _ = read_converted(tmp_path / "a")
    found = {
        target.name: [refusal.reason for refusal in refusals]
        for target, refusals in reachable(converted)
    }
    assert {name: said["refused"] for name, said in servable(plan).items()} == found


def test_check_says_which_engines_and_what_to_change(source_cache: SourceFactory) -> None:
    line = ["check", str(source_cache("qwen3")), "--to", "bd3lm", "--block", "8"]
    shown = CliRunner().invoke(app, line)
    assert "Engines that can serve it" in shown.stdout
    assert "--set token_shift=drop" in shown.stdout
    said = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)["serving"]
    assert said["sdar"]["refused"]
    dropped = [*line, "--set", "token_shift=drop", "--json"]
    said = json.loads(CliRunner().invoke(app, dropped).stdout)["serving"]
    assert [name for name, found in said.items() if not found["refused"]] == [
        "sdar", "llada2", "gguf", "a2d",
    ]  # fmt: skip
    assert said["gguf-diffusion"]["refused"] == [WHOLE_TEXTS]


@pytest.mark.parametrize(("family", "is_there"), [("qwen3", True), ("mistral", False)])
def test_another_layout_is_named_where_it_takes_the_model(
    family: str, is_there: bool, source_cache: SourceFactory
) -> None:
    line = ["check", str(source_cache(family)), "--to", "bd3lm", "--block", "8"]
    shown = " ".join(CliRunner().invoke(app, line).stdout.split())
    assert "Convert with --set token_shift=drop" in shown
    assert ("or export --to a2d" in shown) is is_there
