"""`python -m benchmarks.gpu`: it runs to its end on a CPU, finds faults, and survives breaks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import correctness, models, plan, training
from benchmarks.gpu.checks import Check, run_checks
from benchmarks.gpu.table import CORRECTNESS, Results
from dllm_convert.modeling.published import modeling
from dllm_convert.training import setup

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu_without_a_network(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {line["group"] for line in written["lines"]} == {*gpu.SHARES}
    assert {line["verdict"] for line in written["lines"]} == {"ok", "info"}
    for line in written["lines"]:
        is_time = line["what"] == "time of the phase"
        assert (line["verdict"] == "ok") == (line["group"] == CORRECTNESS and not is_time), line
        assert "not run" not in str(line["measured"]), line
    # The table comes last, with every line in it.
    table = done.stdout.rpartition("\n\n")[2].splitlines()
    assert len(table) == 1 + len(written["lines"])
    assert (tmp_path / "out" / "step_profile.txt").stat().st_size


def results(folder: Path, *, judges: bool = True) -> Results:
    return Results(folder / "results.json", {"device": "none"}, judges_speed=judges)


def verdicts(found: Results) -> list[str]:
    return [line.verdict for line in found.lines]


def test_a_check_that_breaks_leaves_the_next_and_what_was_found(tmp_path: Path) -> None:
    found = results(tmp_path)

    def breaks() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nat line 7")

    def is_full() -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    checks = [
        Check("one", breaks),
        Check("two", is_full),
        Check("three", is_full, may_not_fit=True),
        Check("four", partial(found.add, "training", "four", 1.0, goal="> 2", ok=False)),
        Check("five", partial(found.add, "training", "five", 1.0, goal="> 0", ok=True)),
    ]
    run_checks("training", checks, found, time.monotonic() + 60)
    assert verdicts(found) == ["FAIL", "FAIL", "info", "slow", "ok"]
    assert "\n" not in str(found.lines[0].measured)
    # Another process that opens the same file goes on behind these lines.
    assert results(tmp_path).lines == found.lines


@pytest.mark.parametrize(("group", "verdict"), [(CORRECTNESS, "FAIL"), ("training", "info")])
def test_what_was_not_looked_at_is_not_right(tmp_path: Path, group: str, verdict: str) -> None:
    found = results(tmp_path)
    run_checks(group, [Check("late", lambda: None)], found, time.monotonic() - 1)
    assert verdicts(found) == [verdict]


@pytest.mark.parametrize("judges", [True, False])
def test_goals_of_speed_are_those_of_one_device(tmp_path: Path, judges: bool) -> None:
    found = results(tmp_path, judges=judges)
    found.add("training", "too slow", 1.0, goal="> 2", ok=False)
    found.add(CORRECTNESS, "wrong", 1.0, goal="0", ok=False)
    found.add(CORRECTNESS, "only told", 1.0)
    assert verdicts(found) == ["slow" if judges else "info", "FAIL", "info"]


def fake_phase(folder: Path, name: str, budget: float, *, wrong: str, hangs: str) -> str | None:
    found = results(folder)
    found.add(name, "something", 1.0, goal="2", ok=name != wrong)
    return "ended after 1 s" if name == hangs else None


@pytest.mark.parametrize(
    ("wrong", "hangs", "code"),
    [("", "", 0), ("correctness", "", 1), ("training", "", 0), ("", "decoding", 1)],
)
def test_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, hangs: str, code: int
) -> None:
    phases: list[str] = []

    def phase(name: str, budget: float) -> str | None:
        phases.append(name)
        assert 0 < budget <= 60
        return fake_phase(tmp_path, name, budget, wrong=wrong, hangs=hangs)

    monkeypatch.setattr(gpu, "run_phase", phase)
    chosen = ",".join((*gpu.SHARES, "training"))
    options = Namespace(out=tmp_path, minutes=1.0, phases=chosen, weights=None, tiny=True)
    (tmp_path / "results.json").write_text("of an earlier check, and damaged")
    assert gpu.run(options) == code
    assert phases == ["correctness", "training", "decoding"]


@pytest.mark.parametrize(
    ("program", "said"),
    [("exit 0", None), ("exit 3", "ended with 3"), ("exec sleep 60", "after 1 s")],
)
def test_a_phase_that_dies_or_hangs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str | None
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu, "_GRACE_S", 0.5)
    failure = gpu.run_phase("training", 0.5)
    assert failure is None if said is None else said in str(failure)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--tiny"),
        (["--tiny", "--phases", "training,speed"], "no phase speed; there are correctness"),
        (["--tiny", "--weights", "/nowhere"], "no folder with a config.json"),
        (["--tiny", "--phases", "quality"], "give its folder with --weights"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def added(check: Any, *arguments: Any) -> list[tuple[str, bool | None]]:
    """What a check of correctness adds: the name of each line, and whether it is right."""
    found: list[tuple[str, bool | None]] = []

    def add(what: str, measured: Any, unit: str = "", *, goal: str = "", ok: Any = None) -> None:
        assert goal
        found.append((what, ok))

    check(add, *arguments)
    return found


def all_right(lines: list[tuple[str, bool | None]]) -> bool:
    return bool(lines) and all(ok for _, ok in lines)


def test_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check is right as things are, and fails with the fault it is for."""
    sees = modeling.block_causal_mask
    check = partial(correctness.influence, what="it", target="bd3lm", attention="sdpa")

    def seen(dtype: torch.dtype) -> bool:
        return all_right(added(lambda add: check(add, dtype=dtype)))

    assert seen(torch.float32) and seen(torch.bfloat16)
    for fault in (
        lambda *inputs: torch.ones_like(sees(*inputs)),  # sees what comes
        lambda *inputs: sees(*inputs) & torch.eye(27, dtype=torch.bool),  # sees itself only
    ):
        with monkeypatch.context() as planted:
            planted.setattr(modeling, "block_causal_mask", fault)
            assert not seen(torch.float32)
            assert not seen(torch.bfloat16)
    assert all_right(added(correctness.lora_types))
    with monkeypatch.context() as planted:
        planted.setattr(setup, "keep_masters", lambda model: model)
        assert not all_right(added(correctness.lora_types))


def test_wrong_gradients_and_neighbours_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = correctness.sparse_attention()
    assert all_right(added(correctness.two_streams, attention))
    assert all_right(added(correctness.packed))
    honest = correctness._loss_and_gradients

    def off(attention: str, batch: Any) -> Any:
        loss, gradients = honest(attention, batch)
        if attention != "sdpa":
            name = next(reversed(gradients))
            gradients[name] = gradients[name] * 1.01
        return loss, gradients

    monkeypatch.setattr(correctness, "_loss_and_gradients", off)
    lines = added(correctness.two_streams, attention)
    assert [ok for _, ok in lines] == [True, False]
    open_row = correctness.predict

    def sees_neighbours(batch: Any, *arguments: Any) -> Any:
        from dataclasses import replace

        found = open_row(batch, *arguments)
        mask = found.mask
        return replace(found, mask=replace(mask, segments=mask.segments * 0)) if mask else found

    monkeypatch.setattr(correctness, "predict", sees_neighbours)
    assert not all_right(added(correctness.packed))


def test_other_losses_than_the_cpus_are_found(tmp_path: Path) -> None:
    class Another(correctness.Reference):
        def __init__(self) -> None:
            self.found = correctness.train_briefly("full", "fp32", "sdpa")

        def losses(self, method: str) -> list[float]:
            return self.found

    reference = Another()
    assert all_right(added(correctness.same_training, "steps", "full", "fp32", reference))
    reference.found[-1] *= 1.001
    assert not all_right(added(correctness.same_training, "steps", "full", "fp32", reference))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # SmolLM2 has no biases at q, k and v, and no row for a mask.
    [
        ("135M", 134_515_008 + 30 * (576 + 2 * 192) + 576),
        ("1.5B", 1_543_714_304),
        ("7B", 7_615_616_512),
    ],
)
def test_sizes_are_those_of_the_models_they_are_named_after(name: str, parameters: int) -> None:
    assert models.shape_of(name).parameters == parameters


def test_peaks_are_those_of_the_data_sheets() -> None:
    assert models.peak_flops("NVIDIA H200") == pytest.approx(989e12)
    assert models.peak_flops("NVIDIA A100-SXM4-80GB") == pytest.approx(312e12)
    assert models.peak_flops("NVIDIA GeForce RTX 4090") is None


def test_operations_of_the_autoregressive_model_are_six_per_weight() -> None:
    shape = models.shape_of("1.5B")
    found = training.autoregressive_flops("1.5B", 1024)
    weights = 6 * (shape.matrices + shape.vocabulary_matrix)
    assert weights < found < 1.05 * weights


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(0, 2), (1, 3)], 3),
        ([(5, 6), (0, 2), (1, 1.5)], 3),
        ([(0, 9), (1, 2), (8, 10)], 10),
    ],
)
def test_kernels_side_by_side_count_once(
    intervals: list[tuple[float, float]], length: float
) -> None:
    assert training.covered(intervals) == length


def test_the_page_shows_what_the_plan_says() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    command = "python -m benchmarks.gpu.plan --write docs/gpu.md"
    assert plan.written(page) == page, f"run `{command}`"
    assert command in page
