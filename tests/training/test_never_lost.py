"""SIGKILL at any moment: the same command ends in the checkpoint of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SourceFactory
from running import Launcher, command
from safetensors.torch import load_file

METHODS = ("--full", "--lora=4")
STEPS = 16
# Measured: 0. Bits are the same on one machine; a library may sum in another order elsewhere.
TOLERANCE = 1e-6
COMPARED = ("loss", "nelbo", "learning_rate", "grad_norm")


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    lines: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    train: dict[str, object]

    @classmethod
    def of(cls, out: Path) -> Outcome:
        rows = (out / ".work/metrics.jsonl").read_text().splitlines()
        manifest = json.loads((out / "dllm_convert.json").read_text())
        assert manifest["verification"]["passed"]
        assert sorted(path.name for path in (out / ".work").iterdir()) == [
            "journal.json",
            "lock",
            "metrics.jsonl",
        ]
        train = manifest["measurements"]["train"]
        return cls([json.loads(row) for row in rows], load_file(out / "model.safetensors"), train)

    def difference(self, other: Outcome) -> float:
        """Return the largest difference between two loss curves and between their weights."""
        assert [line["step"] for line in self.lines] == [line["step"] for line in other.lines]
        assert [line["tokens"] for line in self.lines] == [line["tokens"] for line in other.lines]
        assert self.weights.keys() == other.weights.keys()
        curve = max(
            abs(mine[name] - theirs[name])
            for mine, theirs in zip(self.lines, other.lines, strict=True)
            for name in COMPARED
        )
        values = max(
            float((self.weights[name] - other.weights[name]).abs().max()) for name in self.weights
        )
        return max(curve, values)


@dataclass(frozen=True)
class Bench:
    """A warm process, a source, and what undisturbed runs of it end in."""

    run: Launcher
    source: Path
    reference: dict[str, Outcome]
    changes: dict[str, list[str]]

    def command(self, out: Path, method: str) -> list[str]:
        return command(self.source, out, f"--steps={STEPS}", method)

    def finish(self, out: Path, method: str, *, fast: bool = True) -> float:
        """Run the command once more, without faults, and compare with the undisturbed run."""
        code = self.run.run(self.command(out, method), fast=fast)
        assert code == 0, self.run.said
        outcome = Outcome.of(out)
        assert outcome.train["steps"] == STEPS
        assert outcome.train["tokens"] == self.reference[method].train["tokens"]
        return outcome.difference(self.reference[method])


@pytest.fixture(scope="module")
def bench(source_cache: SourceFactory, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("reference")
    source = source_cache("llama")
    run = Launcher(root)
    reference, changes = {}, {}
    for method in METHODS:
        out, log = root / f"out{method}", root / f"changes{method}"
        argv = command(source, out, f"--steps={STEPS}", method)
        code = run.run(argv, kill_at=0, below=str(out), count=str(log), fast=True)
        assert code == 0, run.said
        reference[method] = Outcome.of(out)
        changes[method] = log.read_text().splitlines()
    return Bench(run, source, reference, changes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_changes_of_files(seed: int, bench: Bench, tmp_path: Path) -> None:
    """One folder, killed again and again, each time before a later change of some file."""
    rng, method, out = random.Random(seed), METHODS[seed % 2], tmp_path / "out"
    kills = 0
    for _ in range(7):
        code = bench.run.run(
            bench.command(out, method), kill_at=rng.randint(4, 40), below=str(out), fast=True
        )
        assert code in (0, -signal.SIGKILL), bench.run.said
        kills += code != 0
        whole = (out / "config.json").exists()
        assert not whole or (out / "model.safetensors").exists()
    assert kills >= 4
    assert bench.finish(out, method) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("place", ["metrics.jsonl", "complete", "trained", "staged", "journal"])
def test_killed_in_the_middle_of(place: str, bench: Bench, tmp_path: Path) -> None:
    """Die at one change of every kind that decides what the next session finds."""
    method, out = METHODS[len(place) % 2], tmp_path / "out"
    numbers = [n for n, line in enumerate(bench.changes[method], 1) if place in line]
    # The middle one is in training, the last in the end of the stage.
    for number in {numbers[len(numbers) // 2], numbers[-1]}:
        shutil.rmtree(out, ignore_errors=True)
        argv = bench.command(out, method)
        code = bench.run.run(argv, kill_at=number, below=str(out), fast=True)
        assert code == -signal.SIGKILL, bench.run.said
        assert bench.finish(out, method) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(seed: int, bench: Bench, tmp_path: Path) -> None:
    rng, method, out = random.Random(seed), METHODS[seed % 2], tmp_path / "out"
    for _ in range(7):
        pid = bench.run.start(bench.command(out, method), fast=True)
        time.sleep(rng.uniform(0.05, 0.9))
        os.kill(pid, signal.SIGKILL)
        assert bench.run.wait(pid) in (0, -signal.SIGKILL)
    assert bench.finish(out, method, fast=False) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("written", [2, 6, 7, 9, 21])
def test_killed_inside_a_file(written: int, bench: Bench, tmp_path: Path) -> None:
    """Half of a weights, optimizer, scheduler or RNG file of a later checkpoint; the result."""
    method, out = "--full", tmp_path / "out"
    code = bench.run.run(bench.command(out, method), tear=written, fast=True)
    assert code == -signal.SIGKILL, bench.run.said
    assert bench.finish(out, method) <= TOLERANCE
    assert ("resuming" in bench.run.said) == (written > 5)
