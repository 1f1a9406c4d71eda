"""A time limit sets the number of steps, once, and the learning rate ends with them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from test_trainer import converted

from dllm_convert.common.console import Reporter
from dllm_convert.pipeline.workspace import Workspace, read_workspace
from dllm_convert.recipe.schema import Training
from dllm_convert.training import callbacks
from dllm_convert.training.pacing import Pace, end_with, factors, found_pace
from dllm_convert.training.run import TrainResult, train
from dllm_convert.training.trainer import DiffusionTrainer

QUIET = Reporter(quiet=True)


class Clock:
    """Ten seconds a step, whatever it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    real = DiffusionTrainer.training_step

    def training_step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        clock.now += 10.0
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(DiffusionTrainer, "training_step", training_step)
    return clock


SETTINGS = {"steps": 60, "max_minutes": 2.5, "lr_schedule": "linear", "warmup_ratio": 0.1}


def trained(source: Path, folder: Path, paces: list[Pace], **more: Any) -> TrainResult:
    shutil.rmtree(folder / "a", ignore_errors=True)
    folder.mkdir(exist_ok=True)
    plan, data = converted(source, folder / "a", **(SETTINGS | more))
    return train(
        *(plan, data, folder / "a", folder / "b", folder / "work", QUIET),
        pace=paces[-1] if paces else None,
        settled=paces.append,
    )


def rates(folder: Path) -> list[float]:
    text = (folder / "work/metrics.jsonl").read_text()
    return [json.loads(line)["learning_rate"] for line in text.splitlines()]


def test_the_rate_ends_with_the_time(
    tmp_path: Path, source_cache: SourceFactory, clock: Clock
) -> None:
    paces: list[Pace] = []
    result = trained(source_cache("llama"), tmp_path, paces)
    (pace,) = paces
    assert pace.at == 3
    # 150 s at 10 s a step, with a reserve.
    assert 13 <= pace.steps <= 15
    assert (result.steps, result.stopped) == (pace.steps, "time")
    found = rates(tmp_path)
    assert max(found) > 0.7e-2
    assert found[-1] < 0.15 * max(found), "not cut off at the height"
    assert found[4:] == sorted(found[4:], reverse=True)


def test_with_time_enough_nothing_changes(
    tmp_path: Path, source_cache: SourceFactory, clock: Clock
) -> None:
    paces: list[Pace] = []
    result = trained(source_cache("llama"), tmp_path, paces, max_minutes=60.0, steps=8)
    assert [pace.steps for pace in paces] == [8]
    assert (result.steps, result.stopped) == (8, "steps")
    unlimited = trained(source_cache("llama"), tmp_path / "b", [], max_minutes=None, steps=8)
    assert rates(tmp_path) == rates(tmp_path / "b")
    assert unlimited.final_loss == result.final_loss


@pytest.mark.parametrize("at", [1, 2, 5, 9, 12])
def test_a_resumed_run_has_the_same_rates(
    at: int,
    tmp_path: Path,
    source_cache: SourceFactory,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before it is known how many steps there are, and after; saved after every fourth."""
    more = {"save_steps": 4}
    whole: list[Pace] = []
    first = trained(source_cache("llama"), tmp_path / "whole", whole, **more)
    real, steps = DiffusionTrainer.training_step, itertools.count()

    def dies(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if next(steps) == at:
            raise RuntimeError("killed")
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(DiffusionTrainer, "training_step", dies)
    paces: list[Pace] = []
    with pytest.raises(RuntimeError, match="killed"):
        trained(source_cache("llama"), tmp_path / "cut", paces, **more)
    if at > 3:
        assert paces == whole
    again = trained(source_cache("llama"), tmp_path / "cut", paces, **more)
    if at > 3:
        assert again.steps == first.steps
        assert rates(tmp_path / "cut") == rates(tmp_path / "whole")
        assert again.final_loss == first.final_loss
    assert len(paces) == 1


@pytest.mark.parametrize(
    ("durations", "seconds", "limit", "pace"),
    [
        ([9.0], 9.0, 100.0, None),
        ([9.0, 1.0], 10.0, 100.0, None),
        ([9.0, 1.0, 1.0], 11.0, 100.0, Pace(3, 3 + 86)),
        ([9.0, 1.0, 1.0], 11.0, 10_000.0, None),
        ([1.0] * 60, 60.0, 10_000.0, Pace(60, 500)),
        ([30.0, 20.0], 50.0, 100.0, Pace(2, 2 + 2)),
        ([9.0, 60.0, 1.0, 1.0], 71.0, 100.0, Pace(4, 4 + 28)),
        ([90.0, 60.0], 150.0, 100.0, Pace(2, 3)),
    ],
)
def test_how_many_steps_fit(
    durations: list[float], seconds: float, limit: float, pace: Pace | None
) -> None:
    assert found_pace(durations, seconds, len(durations), limit, 500) == pace


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("at", "steps"), [(3, 4), (3, 25), (12, 30), (3, 100)])
def test_rates_are_as_planned_and_then_end(name: Any, at: int, steps: int) -> None:
    training = Training(lr_schedule=name, steps=100, warmup_ratio=0.1, learning_rate=1.0)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    # Made for another number of steps, as of a training that is resumed.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors(training, steps))
    end_with(schedule, Pace(at, steps), training)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    planned, timed = factors(training, 100), factors(training, steps)
    assert found == [planned(n) if n <= at else timed(n) for n in range(steps)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(float(name == "constant_with_warmup"))


def test_the_journal_remembers(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, run="r")
    (tmp_path / ".work").mkdir()
    workspace.record()
    assert read_workspace(tmp_path).pace is None
    workspace.pace = Pace(3, 25).as_dict()
    workspace.record()
    assert Pace(**(read_workspace(tmp_path).pace or {})) == Pace(3, 25)
