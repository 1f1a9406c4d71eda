"""Families without an adapter: measured, converted, verified like those that have one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generic
import pytest
from transformers import AutoModelForCausalLM

from dllm_convert.adapters import adapter_of, has_adapter
from dllm_convert.adapters.base import Measured
from dllm_convert.adapters.measured import adapter_as_dict, adapter_from_dict
from dllm_convert.common.console import Reporter
from dllm_convert.planning.conversion import ConversionPlan, make_plan, plan_as_dict
from dllm_convert.probing.instance import decoder_layers
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.verification import GROUPS, VerificationReport, verify_checkpoint

CONVERTIBLE = [name for name in generic.CONFIGS if name != "mamba"]
WINDOWED = ("gemma2", "gemma3_text", "cohere2")
IN_PROCESS = [group for group in GROUPS if group != "portability"]


def convert(base: Path, folder: Path, target: str) -> ConversionPlan:
    from dllm_convert.weights.run import adapt

    recipe = {
        "source": str(base),
        "target": target,
        "block_size": 8 if target == "bd3lm" else None,
        "data": {"sequence_length": 64},
        "training": {"method": "none"},
    }
    adapter = generic.measured(base).require()
    plan = make_plan(Recipe.model_validate(recipe), inspect_source(str(base)), adapter)
    adapt(plan, base, folder, Reporter(quiet=True))
    return plan


def complaints(report: VerificationReport) -> list[str]:
    return [f"{p.name}: {p.measured}; required {p.required}; {p.detail}" for p in report.failed]


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("model_type", CONVERTIBLE)
def test_a_measured_family_passes_the_probes_of_a_written_one(
    generic_source: Callable[[str], Path], tmp_path: Path, model_type: str, target: str
) -> None:
    assert not has_adapter(model_type)
    if target == "mdlm" and model_type in ("olmo2", "phi3", "gpt_neox"):
        pytest.skip("as the others of its kind")
    base, folder = generic_source(model_type), tmp_path / "out"

    plan = convert(base, folder, target)
    report = verify_checkpoint(folder, against=base, untrained=True, groups=IN_PROCESS)

    assert complaints(report) == []
    passed = {probe.name for probe in report.probes if probe.passed}
    assert passed >= {"attention-eager", "attention-layers", "base-logits", "generate", "weights"}
    assert "cache" in passed or target == "mdlm"
    json.dumps(plan_as_dict(plan))
    config = json.loads((folder / "config.json").read_text())
    assert adapter_of(config) == plan.adapter
    opened = any("window" in change for change in plan.attention_changes)
    assert opened == (model_type in WINDOWED)


def test_layers_keep_their_places(generic_source: Callable[[str], Path]) -> None:
    """config.json sorts its keys, so places are counted among sorted names."""
    adapter = generic.measured(generic_source("gemma2")).require()
    assert adapter.measured is not None
    assert adapter.measured.kinds == ("sliding_attention", "full_attention")
    text = json.dumps(adapter_as_dict(adapter), sort_keys=True)
    assert adapter_from_dict(json.loads(text)) == adapter
    mixed = Measured("5.23.0", {}, {"sliding": 2, "full": 2}, order=(1, 0, 1, 0))
    assert mixed.kinds == ("sliding", "full", "sliding", "full")

    source = inspect_source(str(generic_source("gemma2")))
    recipe = Recipe(source=source.given, target="mdlm", data=Data(sequence_length=64))
    layers = make_plan(recipe, source, adapter).layers
    assert [(group.layers, group.before) for group in layers] == [
        ((0,), "causal, window of 4"),
        ((1,), "causal"),
    ]


@pytest.mark.parametrize("model_type", CONVERTIBLE)
def test_parts_are_those_of_the_model(
    generic_source: Callable[[str], Path], model_type: str
) -> None:
    """Layers are called `h` or `layers`, one file holds experts one by one, some heads are tied."""
    base = generic_source(model_type)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = generic.measured(base).require()
    recipe = Recipe(source=str(base), target="mdlm", data=Data(sequence_length=64))
    plan = make_plan(recipe, inspect_source(str(base)), adapter)
    shape, rows = plan.shape, plan.mask.rows_after - plan.mask.rows_before

    assert shape is not None
    layers = [p for layer in decoder_layers(model) for p in layer.parameters()]
    assert shape.layer_parameters == sum(p.numel() for p in layers)
    assert shape.tied == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    grown = rows * (1 if shape.tied else 2) * shape.hidden
    assert shape.parameters == sum(p.numel() for p in model.parameters()) + grown
    assert shape.matrices > 0.5 * shape.layer_parameters or model_type == "mixtral"


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox"])
def test_its_own_code_needs_nothing_but_transformers(
    generic_source: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    convert(generic_source(model_type), tmp_path / "out", "bd3lm")

    report = verify_checkpoint(tmp_path / "out", groups=["files", "tokens", "portability"])

    assert complaints(report) == []
    assert {"portable", "portable-stock"} <= {p.name for p in report.probes if p.passed}


def test_a_state_space_model_is_refused_with_what_was_measured(
    generic_source: Callable[[str], Path],
) -> None:
    report = generic.measured(generic_source("mamba"))

    assert report.adapter is None
    assert "position 0 does not see token 1" in str(report.reason)
    assert {f.name for f in report.findings if f.passed} >= {"base-causal"}


def test_a_report_survives_its_way_through_json(generic_source: Callable[[str], Path]) -> None:
    from dllm_convert.probing import ProbeReport

    report = generic.measured(generic_source("gemma2"))
    again: Any = json.loads(json.dumps(report.as_dict()))

    assert ProbeReport.from_dict(again) == report
