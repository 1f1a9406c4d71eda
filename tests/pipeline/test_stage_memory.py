"""A run holds one model at a time, in the type that its plan names."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import recipe

from dllm_convert.common.console import Reporter
from dllm_convert.modeling import loading
from dllm_convert.pipeline.context import Run, Stage
from dllm_convert.pipeline.measures import measured_in
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.pipeline.run import plan_conversion, run
from dllm_convert.planning.devices import GPUS, USABLE_MEMORY, cpu
from dllm_convert.planning.estimate import stages_on
from dllm_convert.planning.stages import DURING

ROOT = Path(__file__).parents[2]
Seen = list[tuple[str, str, int]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Stage, type and number of models that lived already, of every load of a run."""
    seen: Seen = []
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    stages: list[str] = []
    real_load, real_work = loading.load_complete, Run._work

    def load_complete(cls: Any, source: Any, **settings: Any) -> Any:
        # Models that nobody holds are gone by reference, or the stage before freed them.
        seen.append((stages[-1], str(settings["dtype"]).removeprefix("torch."), len(alive)))
        model = real_load(cls, source, **settings)
        alive.add(model)
        return model

    def work(self: Run, stage: Stage[Any]) -> Any:
        stages.append(stage.name)
        return real_work(self, stage)

    monkeypatch.setattr(loading, "load_complete", load_complete)
    monkeypatch.setattr(Run, "_work", work)
    return seen


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_never_holds_two_models(
    source_factory: Callable[..., Path], tmp_path: Path, loads: Seen, method: str
) -> None:
    made = recipe(source_factory("llama"), method=method, steps=2)
    how = RunOptions(verify=Depth.FILES)

    run(made, tmp_path / "out", Reporter(quiet=True), how=how)

    assert [(stage, alive) for stage, _, alive in loads] == [
        ("baseline", 0),
        ("train", 0),
        ("measure", 0),
        # The untrained conversion, the base, the result.
        *[("views", 0)] * 3,
        # The result, and the base beside whose text it is shown.
        *[("sample", 0)] * 2,
    ]
    plan = plan_conversion(made)
    assert plan.shape is not None
    planned = stages_on(plan.shape, made, cpu(2, 10**10, bf16=True), causal=True)
    held = {stage.stage: stage.held for stage in planned}
    assert all(dtype == held[stage] for stage, dtype, _ in loads)


@pytest.mark.parametrize(
    ("training", "held"),
    [
        ({"precision": "auto", "method": "full"}, "bfloat16"),
        ({"precision": "bf16", "method": "lora"}, "bfloat16"),
        ({"precision": "fp32", "method": "lora"}, "float32"),
        ({"method": "lora", "precision": "bf16", "lora": {"quantize": "nf4"}}, "bfloat16"),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_measured_in_the_type_that_is_planned(
    source_factory: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, Any],
    held: str,
) -> None:
    made = recipe(source_factory("llama"), **training)
    plan = plan_conversion(made)
    assert plan.shape is not None
    planned = {s.stage: s for s in stages_on(plan.shape, made, GPUS[0], causal=True)}
    measured = ("baseline", "measure", "views", "sample")
    assert {planned[stage].held for stage in measured} == {held}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    # On the GPU where the plan says that it is enough, and nowhere else.
    takes = max(planned[stage].device for stage in measured)
    for room, where in ((int(takes / USABLE_MEMORY) + 2, "cuda"), (takes, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda room=room: (0, room))
        found = measured_in(Run(plan, None, Reporter(quiet=True)))  # type: ignore[arg-type]
        assert found == {"device": where, "dtype": getattr(torch, held)}


@pytest.mark.slow
@pytest.mark.stranger
def test_stages_take_what_is_planned(source_factory: Callable[..., Path]) -> None:
    # Large enough for its weights and logits to show beside the interpreter and its libraries.
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "vocab_padding": 32_000}
    source = source_factory("llama", tied=True, layers=4, **sizes)
    line = [sys.executable, "-m", "benchmarks.stages", str(source), "--batch", "8"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [row.split() for row in done.stdout.splitlines() if row.split()[-1:] != ["peak"]]
    ratios = {row[0]: float(row[-1]) for row in rows if len(row) == 4}
    assert list(ratios) == list(DURING)
    assert all(0.85 < ratio < 1.2 for ratio in ratios.values()), ratios
