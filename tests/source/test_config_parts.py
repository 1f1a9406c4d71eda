"""Parts that config.json names: what transformers does not have is refused in the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.adapters import all_adapters
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.config_parts import ACTIVATIONS, SCALINGS
from dllm_convert.source.inspect import inspect_source

Sources = Callable[..., Path]
CAUSAL = [a.model_type for a in all_adapters() if a.attention == "causal"]
FULL: dict[str, Any] = {
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def plan_with(source: Path, **config: Any) -> ConversionPlan:
    info = inspect_source(str(source))
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm"})
    kept = {k: v for k, v in info.config.items() if k not in ("rope_parameters", "rope_scaling")}
    return make_plan(recipe, replace(info, config={**kept, **config}))


def rotary(source: Path) -> int:
    config = json.loads((source / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(width) // 2


def test_the_tables_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    weightless = {name for name in ACT2FN if not list(ACT2FN[name].parameters())}
    assert weightless == ACTIVATIONS
    assert {*ROPE_INIT_FUNCTIONS, "default"} == {*SCALINGS}


@pytest.mark.parametrize("family", [a.model_type for a in all_adapters()])
@pytest.mark.parametrize("named", ["nope", "SiLU", "prelu", "xielu", None, 3, ["silu"]])
def test_an_activation_that_is_not_there(source_cache: Sources, family: str, named: Any) -> None:
    with pytest.raises(IncompatibleError, match="hidden_act is "):
        plan_with(source_cache(family), hidden_act=named)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("field", ["type", "rope_type"])
def test_every_scaling_of_transformers_passes(
    source_cache: Sources, family: str, key: str, field: str
) -> None:
    source = source_cache(family)
    factors = [1.0] * rotary(source)
    for kind in SCALINGS:
        scaling = {**FULL, "short_factor": factors, "long_factor": factors, field: kind}
        plan_with(source, **{key: scaling})
    plan_with(source, **{key: None})
    plan_with(source, **{key: {"rope_theta": 10000.0}})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("scaling", "message", "hint"),
    [
        ({"rope_type": "nope"}, "rope_type is 'nope', expected one of default, linear", ""),
        ({"rope_type": None}, "rope_type is 'None'", ""),
        ({"type": "su", "factor": 2.0}, "rope_type is 'su'", "Write longrope"),
        ({"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_type is 'mrope'", ""),
        *(
            ({"rope_type": kind}, f"has no {' and no '.join(needs)}, which {kind}", "")
            for kind, needs in SCALINGS.items()
            if needs
        ),
        ({"rope_type": "linear", "factor": None}, "has no factor", ""),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "short_factor is 1 numbers, expected ",
            "",
        ),
        (
            {"rope_type": "longrope", "short_factor": "1", "long_factor": [1.0]},
            "short_factor is no list",
            "",
        ),
    ],
)
def test_a_scaling_that_cannot_be_computed(
    source_cache: Sources, key: str, scaling: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(IncompatibleError, match=message) as caught:
        plan_with(source_cache("llama"), **{key: scaling})
    assert hint in str(caught.value.hint)
