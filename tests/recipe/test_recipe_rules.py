"""Rules between the fields of a recipe: a recipe that loads is sound, and says who broke one."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SourceFactory
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.published.options import DecodingOptions
from dllm_convert.recipe.loading import amend_recipe, load_recipe
from dllm_convert.recipe.rules import decoding_contradictions
from dllm_convert.recipe.schema import Recipe

PLAIN: dict[str, Any] = {"target": "bd3lm", "block_size": 8}
UNIFORM = {"noise.kernel": "uniform", "noise.discrete_steps": 4, "noise.complementary": False}
WALK = {"noise.kernel": "neighbours", "noise.neighbours": 3, "noise.jumps": 2.0}
LEARNED = {"noise.schedule": "learned", "noise.classes": 4, "noise.exponent_rate": 0.01}
DRAWN = {"generation.sampler": "ancestral", "generation.temperature": 1.0}
MDLM = {"target": "mdlm", "block_size": None}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target": "mdlm", "block_size": 32}, "block_size 32 is for bd3lm"),
    ({"block_size": 48, "data.sequence_length": 256}, "whole number of blocks"),
    ({"block_size": 512, "data.sequence_length": 256}, "whole number of blocks"),
    ({"noise.min_time": 0.9, "noise.max_time": 0.5}, "is not below"),
    ({"noise.min_time": 0.5, "noise.max_time": 0.5}, "is not below"),
    ({"noise.kernel": "uniform"}, "noise.discrete_steps=1000"),
    ({**UNIFORM, "noise.draw": "count"}, r"noise\.draw is about masked tokens"),
    ({**UNIFORM, "noise.position_bias": 1.0}, r"noise\.position_bias is about"),
    ({**UNIFORM, "noise.complementary": True}, r"noise\.complementary is about"),
    ({**UNIFORM, "training.loss_weight": "uniform"}, r"training\.loss_weight is about"),
    ({**UNIFORM, "training.mask_noise_steps": 3}, r"training\.mask_noise_steps is about"),
    ({"noise.discrete_steps": 4, "noise.complementary": True}, "exclude each other"),
    ({"noise.discrete_steps": 4, "noise.draw": "count"}, "exclude each other"),
    ({**MDLM, "training.ar_loss_weight": 0.5}, "clean stream"),
    ({"generation.top_p": 0.5}, r"generation\.top_p does nothing without a generation\.temp"),
    ({"generation.min_p": 0.5}, r"generation\.min_p does nothing"),
    ({"generation.top_k": 5}, r"generation\.top_k does nothing"),
    ({"generation.block_length": 8}, r"generation\.block_length is for mdlm"),
    ({"generation.approximate_cache": True}, "needs generation.block_length"),
    ({**MDLM, "generation.approximate_cache": True}, "needs generation.block_length"),
    ({**MDLM, "generation.block_length": 8, "generation.remasking": "random"}, "do not go"),
    ({"generation.remasking_ratio": 0.5}, r"generation\.remasking_ratio does nothing without"),
    (LEARNED | {"noise.classes": None}, r"noise\.classes is missing"),
    ({"noise.exponent_rate": 0.1}, r"is linear, and noise\.exponent_rate is 0\.1"),
    (LEARNED | {"noise.draw": "count"}, "it is about the times"),
    (LEARNED | {"noise.complementary": True}, "no draw of another time"),
    (LEARNED | {"training.distillation.weight": 0.5}, "is no cross-entropy"),
    (LEARNED | {"training.auxiliary_loss_weight": 0.5}, "is no cross-entropy"),
    (LEARNED | {"training.loss_weight": "uniform"}, "would be no bound"),
    (LEARNED | {"noise.discrete_steps": 8}, "one of continuous time"),
    (LEARNED | {"data.streaming": "on"}, "counted before training"),
    ({**UNIFORM, "noise.jumps": 2.0}, r"is uniform, and noise\.jumps is 2\.0"),
    ({**UNIFORM, **WALK, "noise.neighbours": None}, r"noise\.neighbours is missing"),
    ({**UNIFORM, **WALK, "noise.discrete_steps": None}, "the neighbours kernel has a bound in"),
    ({**UNIFORM, **WALK, "noise.complementary": True}, "the neighbours kernel masks none"),
    ({**UNIFORM, **WALK, **DRAWN}, "is only there in training"),
    (DRAWN | {"generation.temperature": 0.0}, "needs a generation.temperature above 0"),
    (DRAWN | {"generation.confidence_threshold": 0.9}, "which ranks nothing"),
    (DRAWN | {"generation.remasking": "random"}, "each says what a step writes"),
    ({**UNIFORM, "generation.guidance_scale": 2.0}, "which only the absorbing kernel has"),
    (
        {**UNIFORM, **WALK, "generation.guidance_scale": 2.0},
        "which only the absorbing kernel has",
    ),
]


@pytest.mark.parametrize(("fields", "said"), WRONG, ids=str)
def test_what_contradicts_is_refused_with_its_place(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("source: a/b\ntarget: bd3lm\nblock_size: 8\n")
    with pytest.raises(IncompatibleError, match=said) as caught:
        load_recipe(str(path), overrides=fields)
    assert caught.value.message.startswith("the command line: ")
    assert caught.value.hint
    with pytest.raises(IncompatibleError, match=said):
        amend_recipe(load_recipe(str(path), overrides={}), fields)
    path.write_text("\n".join(["source: a/b", *_nested({**PLAIN, **fields})]))
    with pytest.raises(IncompatibleError, match=said) as caught:
        load_recipe(str(path), overrides={})
    assert caught.value.message.startswith(f"{path}: ")


def _nested(fields: dict[str, Any]) -> list[str]:
    sections: dict[str, Any] = {}
    for name, value in fields.items():
        section, _, leaf = name.rpartition(".")
        sections.setdefault(section, {})[leaf] = value
    top = sections.pop("", {})
    return [f"{name}: {json.dumps(value)}" for name, value in {**top, **sections}.items()]


def test_it_is_the_later_of_two_places_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("source: a/b\ntarget: bd3lm\nblock_size: 8\ntraining: {ar_loss_weight: 0.5}\n")
    with pytest.raises(IncompatibleError, match="clean stream") as caught:
        load_recipe(str(path), overrides={"target": "mdlm"})
    assert caught.value.message.startswith("the command line: ")


def test_the_hint_for_a_block_that_does_not_divide_works() -> None:
    fields = {"target": "bd3lm", "block_size": 48, "data.sequence_length": 256}
    with pytest.raises(IncompatibleError) as caught:
        load_recipe("a/b", overrides=fields)
    assert "data.sequence_length=240" in str(caught.value.hint)
    load_recipe("a/b", overrides=fields | {"data.sequence_length": 240})


def test_a_recipe_made_in_python_is_sound_too() -> None:
    with pytest.raises(ValueError, match="bd3lm needs a block size"):
        Recipe.model_validate({"source": "a/b", "target": "bd3lm"})
    Recipe.model_validate({"source": "a/b", **PLAIN})


CHOICES: dict[str, tuple[Any, ...]] = {
    "block_length": (None, 8),
    "sub_block_size": (None, 4),
    "approximate_cache": (False, True),
    "remasking": (None, "random"),
    "guidance_scale": (1, 2.0),
    "temperature": (0.0, 0.7),
    "sampler": (None, "ancestral"),
    "verify_with": (None,),
}


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_what_the_published_file_refuses_is_refused_here(blocks: bool, masks: bool) -> None:
    """It stands alone, so it has its own words; what it cannot compute must not be planned."""
    for values in product(*CHOICES.values()):
        chosen = dict(zip(CHOICES, values, strict=True))
        found = list(
            decoding_contradictions(
                {name for name, value in chosen.items() if value},
                SimpleNamespace(**chosen),
                blocks=blocks,
                masks=masks,
            )
        )
        try:
            DecodingOptions(
                mask_token_id=1,
                max_new_tokens=8,
                block_size=8 if blocks else None,
                noise_tokens=0 if masks else 16,
                **chosen,
            )
        except ValueError:
            assert found, chosen
        else:
            assert not found, (chosen, found)


@pytest.mark.parametrize(
    "chosen", ["noise.schedule=learned", "noise.kernel=neighbours", "noise.kernel=uniform"]
)
def test_what_is_missing_is_said_at_once(chosen: str, source_cache: SourceFactory) -> None:
    """Beside a preset that draws noise in a way of its own; and the plan says what noise does."""
    line = ["check", str(source_cache("llama")), "--to", "bd3lm", "--full", "--set", chosen]
    refused = CliRunner().invoke(app, line)
    assert refused.exit_code == 3
    told = " ".join(refused.stderr.split())
    fields = re.findall(r"--set (\S+=[^\s,]+)", told)
    assert len(fields) >= 3
    planned = CliRunner().invoke(app, [*line, *(part for one in fields for part in ("--set", one))])
    assert planned.exit_code == 0, planned.stderr
    assert "noise: " in planned.stdout
