"""The preset `lossless`: every family whose base can stay takes it as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generic
import pytest
from conftest import SourceFactory
from gated import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.modeling.loading import load_model
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.data.text import prepare_data
from dllm_convert.training.run import train
from dllm_convert.weights.run import adapt

QUIET = Reporter(quiet=True)
SHORT: dict[str, Any] = {
    "training.steps": 2,
    "training.precision": "fp32",
    "data.source": "pydoc",
    "data.sequence_length": 24,
    "data.max_documents": 30,
}


def planned(source: Path, family: str, **more: Any) -> ConversionPlan:
    recipe = load_recipe(str(source), overrides=more, preset="lossless")
    measured = None if family in FAMILIES else generic.measured(source).require()
    return make_plan(recipe, inspect_source(str(source)), measured)


@pytest.mark.parametrize("family", [*FAMILIES, "window", *generic.CLOSED, "gemma3_text", "olmo2"])
def test_it_trains_and_the_text_is_the_bases(
    family: str, tmp_path: Path, source_cache: SourceFactory, generic_source: SourceFactory
) -> None:
    if family == "window":
        family, source = "mistral", source_cache("mistral", sliding_window=16)
    else:
        source = source_cache(family) if family in FAMILIES else generic_source(family)
    whole = planned(source, family)
    assert whole.recipe.training.distillation.weight > 0
    assert whole.config_updates["diffusion"]["acts_on"] == "noisy"
    plan = planned(source, family, **SHORT)
    adapt(plan, source, tmp_path / "a", QUIET)
    data = prepare_data(plan.recipe, AutoTokenizer.from_pretrained(tmp_path / "a"), QUIET)
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "w", QUIET)
    lines = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").open()]
    assert all(line["divergence"] > 0 for line in lines) and len(lines) == 2
    base = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = data.held_out[0].tokens[:1, :9]
    expected = base.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model = load_model(tmp_path / "b", plan.adapter).eval()
    assert model.generate(
        ids, max_new_tokens=12, verify_with="base", eos_token_id=-1
    ).equal(expected)  # fmt: skip
