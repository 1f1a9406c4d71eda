"""`serve`: the engine that is to serve a conversion chooses what it needs, or says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import SourceFactory
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.cli.options import EngineName
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.layouts.registry import TARGETS
from dllm_convert.planning.servable import servable
from dllm_convert.recipe.engines import NEEDS, Serve

WRITTEN = {name.casefold() for target in TARGETS.values() for name in target.engines}
READ = {
    "sglang": ("llama", "mistral", "qwen2", "qwen3"),
    "lmdeploy": ("qwen3",),
    "mlx-vlm": ("llama", "mistral", "qwen2", "qwen3"),
    "vllm": ("llama", "mistral"),
    "llama.cpp": ("llama", "mistral", "qwen2", "qwen3"),
    "llama-diffusion-cli": ("llama", "mistral", "qwen2", "qwen3"),
    "dllm": ("llama", "qwen2", "qwen3"),
}


def test_every_door_knows_the_same_engines() -> None:
    assert set(get_args(Serve)) == set(NEEDS) == {name.value for name in EngineName} == set(READ)
    assert set(NEEDS) >= WRITTEN


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("engine", sorted(set(READ) & WRITTEN))
def test_what_is_chosen_is_what_the_engine_reads(
    engine: Any, family: str, source_cache: SourceFactory
) -> None:
    source = source_cache(family)
    if family not in READ[engine]:
        with pytest.raises(IncompatibleError, match=f"{engine} could not serve it .*{family}"):
            dc.plan(source, serve=engine)
        return
    plan = dc.plan(source, serve=engine)
    layouts = [
        name
        for name, found in servable(plan).items()
        if engine in [one.casefold() for one in found["engines"]] and not found["refused"]
    ]
    assert plan.as_dict()["serve"]["layout"] == layouts[0]


@pytest.mark.parametrize("engine", sorted(set(READ) - WRITTEN))
def test_an_engine_without_a_layout_is_refused(engine: Any, source_cache: SourceFactory) -> None:
    with pytest.raises(IncompatibleError, match=f"writes no layout that {engine} reads"):
        dc.plan(source_cache("llama"), serve=engine)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"overrides": {"token_shift": "keep"}}, "contradicts token_shift: keep.*own position"),
        ({"to": "mdlm"}, "contradicts target: mdlm.*block by block"),
        (
            {"overrides": {"noise": {"kernel": "uniform", "discrete_steps": 8}}},
            "contradicts noise.kernel: uniform.*corrects nothing",
        ),
    ],
)
def test_what_contradicts_the_engine_is_refused_with_its_reason(
    asked: dict[str, Any], said: str, source_cache: SourceFactory
) -> None:
    with pytest.raises(IncompatibleError, match=said) as caught:
        dc.plan(source_cache("qwen3"), serve="sglang", **asked)
    assert caught.value.hint


def test_what_was_said_later_wins_and_a_recipe_can_say_it(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    source = source_cache("qwen3")
    recipe = tmp_path / "a.yaml"
    recipe.write_text(f"source: {source}\ntarget: mdlm\ntoken_shift: keep\n")
    plan = dc.plan(recipe, serve="sglang")
    assert (plan.recipe.target, plan.token_shift, plan.recipe.block_size) == ("bd3lm", False, 32)
    # A plan is asked anew: the later word holds.
    again = dc.plan(dc.plan(source, to="mdlm"), serve="sglang")
    assert (again.recipe.target, again.token_shift) == ("bd3lm", False)
    recipe.write_text(f"source: {source}\ntarget: bd3lm\nserve: sglang\n")
    assert dc.plan(recipe).recipe.token_shift == "drop"
    recipe.write_text(f"source: {source}\ntarget: bd3lm\nserve: sglang\ntoken_shift: keep\n")
    with pytest.raises(IncompatibleError, match=r"a\.yaml: serve: sglang contradicts token_shift"):
        dc.plan(recipe)
    recipe.write_text(f"source: {source}\ntarget: bd3lm\nserve: [sglang]\n")
    with pytest.raises(IncompatibleError, match="serve"):
        dc.plan(recipe)


def test_asking_for_an_engine_makes_no_other_run(source_cache: SourceFactory) -> None:
    asked = dc.plan(source_cache("qwen3"), serve="sglang")
    typed = dc.plan(source_cache("qwen3"), to="bd3lm", overrides={"token_shift": "drop"})
    assert asked.recipe.identity() == typed.recipe.identity()


def test_check_says_what_was_chosen_and_why(source_cache: SourceFactory) -> None:
    line = ["check", str(source_cache("qwen3")), "--serve", "sglang"]
    shown = " ".join(CliRunner().invoke(app, line).stdout.split())
    assert "for SGLang with export --to sdar: target=bd3lm (it decodes block by block)" in shown
    assert "token_shift=drop" in shown
    assert "mask in row 151,669" in shown
    said = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert said["serve"]["engine"] == "SGLang"
    assert said["serving"]["sdar"]["refused"] == []
    refused = CliRunner().invoke(app, [*line, "--set", "token_shift=keep"])
    assert refused.exit_code == 2
    assert re.search("contradicts token_shift", refused.stderr)
    assert CliRunner().invoke(app, [*line[:-1], "sglnag"]).exit_code == 2
