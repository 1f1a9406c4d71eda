"""Families that were measured are evaluated like those with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import generic
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install dllm-convert[eval]")

from tasks_on_disk import write_tasks

from dllm_convert.adapters import adapter_of
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import write_manifest
from dllm_convert.evaluation.harness import DiffusionLM
from dllm_convert.evaluation.record import evaluate_checkpoint
from dllm_convert.evaluation.request import Request
from dllm_convert.evaluation.settings import Settings
from dllm_convert.modeling.converted_config import read_converted_config
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.planning.conversion import make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.weights.run import adapt

QUIET = Reporter(quiet=True)


def convert(base: Path, folder: Path) -> Path:
    recipe = {
        **{"source": str(base), "target": "bd3lm", "block_size": 8},
        **{"data": {"sequence_length": 64}, "training": {"method": "none"}},
    }
    adapter = generic.measured(base).require()
    plan = make_plan(Recipe.model_validate(recipe), inspect_source(str(base)), adapter)
    adapt(plan, base, folder, QUIET)
    dumped = plan.recipe.model_dump(mode="json")
    dumped["data"] |= {"held_out_fraction": 0.5, "held_out_sequences": 2}
    write_manifest(folder, {"recipe": dumped, "files": {}})
    return folder


@pytest.mark.parametrize("model_type", ["olmo2", "gemma2"])
def test_a_measured_family_is_evaluated(
    generic_source: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    base = generic_source(model_type)
    folder = convert(base, tmp_path / "out")
    assert adapter_of(read_converted_config(folder)).measured is not None
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    (tmp_path / "text.txt").write_text("The value of a name is an object.\n\n" * 40)
    request = Request(
        folder,
        ("capitals", "writing"),
        base=str(base),
        include=(str(tasks),),
        limit=1,
        data=str(tmp_path / "text.txt"),
        settings=Settings(draws=1, rounds=1),
    )
    found = evaluate_checkpoint(request, QUIET)
    assert {row["task"] for row in found["results"]} == {"capitals", "writing"}
    assert all("difference" in row for row in found["results"])
    assert found["text"]["nll"]["nats_per_token"] > 0
    model = DiffusionLM(str(folder))
    assert type(model.subject.model) is type(load_checkpoint(folder).model)
