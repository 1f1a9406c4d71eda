"""Signals, full disks, broken checkpoints, two runs at once: nothing is lost, one line says why."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SourceFactory
from running import Launcher, command, wait_until
from test_never_lost import TOLERANCE, Outcome

from dllm_convert.training.resume import COMPLETE_MARKER, last_whole_checkpoint, whole_checkpoints

STEPS = 16
FOREVER = "--steps=100000"


@dataclass(frozen=True)
class Bench:
    """A warm process, a source, and what an undisturbed run of it ends in."""

    run: Launcher
    source: Path
    undisturbed: Path

    def command(self, out: Path, **settings: object) -> list[str]:
        return command(self.source, out, f"--steps={STEPS}", "--lora=64", **settings)

    def ends_as_undisturbed(self, out: Path) -> None:
        assert Outcome.of(out).difference(Outcome.of(self.undisturbed)) <= TOLERANCE

    def goes_on(self, out: Path, argv: list[str]) -> None:
        """Run the command once more, without faults: it ends as if nothing had happened."""
        assert self.run.run(argv, fast=True) == 0, self.run.said
        self.ends_as_undisturbed(out)


@pytest.fixture(scope="module")
def bench(source_cache: SourceFactory, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("reference")
    source = source_cache("llama")
    run = Launcher(root)
    bench = Bench(run, source, root / "out")
    assert run.run(bench.command(root / "out"), fast=True) == 0, run.said
    return bench


def steps(out: Path) -> list[int]:
    rows = (out / ".work/metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["step"] for row in rows]


def error_lines(said: str) -> list[str]:
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_saves_at_the_next_step(
    number: signal.Signals, bench: Bench, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Nothing would be saved before step 1000.
    argv = command(bench.source, out, FOREVER, training__save_steps=1000)
    pid = bench.run.start(argv)
    metrics = wait_until(out, ".work/metrics.jsonl")
    while metrics.stat().st_size == 0:
        time.sleep(0.005)
    os.kill(pid, number)
    assert bench.run.wait(pid) == 130, bench.run.said
    (line,) = error_lines(bench.run.said)
    assert "The same command goes on where it stopped" in line
    last = last_whole_checkpoint(out / ".work/trainer")
    assert last is not None
    assert steps(out) == list(range(1, int(last.name.split("-")[1]) + 1))
    assert [path.name for path in out.iterdir()] == [".work"]


@pytest.mark.slow
def test_interrupted_three_times_it_ends_as_if_undisturbed(bench: Bench, tmp_path: Path) -> None:
    out, argv = tmp_path / "out", bench.command(tmp_path / "out")
    for step in (2, 7, 16):
        # The signal comes from inside, at the end of a known step, so that it is the same always.
        code = bench.run.run(argv, fast=True, signal_at=step)
        assert code == 130, bench.run.said
        last = last_whole_checkpoint(out / ".work/trainer")
        assert last is not None
        assert last.name == f"checkpoint-{step}"
    bench.goes_on(out, argv)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["untrained.partial", "data", "staged"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_training_ends_quickly(
    number: signal.Signals, stage: str, bench: Bench, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = bench.command(out)
    pid = bench.run.start(argv, fast=True)
    wait_until(out, f".work/{stage}")
    os.kill(pid, number)
    code = bench.run.wait(pid)
    assert code == 130, bench.run.said
    assert len(error_lines(bench.run.said)) == 1
    bench.goes_on(out, argv)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = bench.command(out)
    # A save that takes an hour.
    pid = bench.run.start(argv, hang_in_save=True)
    wait_until(out, ".work/hanging").unlink()
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    assert bench.run.wait(pid) == 130, bench.run.said
    assert len(error_lines(bench.run.said)) == 1
    bench.goes_on(out, argv)


@pytest.mark.slow
def test_two_real_runs_on_one_folder(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = command(bench.source, out, FOREVER)
    first = bench.run.start(argv)
    wait_until(out / ".work/trainer", f"checkpoint-*/{COMPLETE_MARKER}")
    before = bench.run.said
    second = bench.run.start(argv, log=tmp_path / "second.log")
    assert bench.run.wait(second) == 1
    (line,) = error_lines((tmp_path / "second.log").read_text())
    assert "another run is writing" in line
    os.kill(first, signal.SIGTERM)
    assert bench.run.wait(first) == 130
    assert before


@pytest.mark.slow
@pytest.mark.parametrize("limit", [9_000, 40_000, 100_000, 150_000])
def test_files_that_cannot_grow(limit: int, bench: Bench, tmp_path: Path) -> None:
    """A limit on the size of a file fails writes half-way: converting, training, saving."""
    out, argv = tmp_path / "out", bench.command(tmp_path / "out")
    code = bench.run.run(argv, file_bytes=limit, fast=True)
    assert code == 1, bench.run.said
    (line,) = error_lines(bench.run.said)
    assert "full" in line or "too large" in line
    bench.goes_on(out, argv)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of a few KiB where that is allowed."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "disk"
        if not mounted:
            folder.mkdir()
            line = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
            if subprocess.run(line, capture_output=True, check=False).returncode:
                pytest.skip("no file system may be mounted here")
            mounted.append(folder)
        else:
            line = ["mount", "-o", f"remount,size={kib}k", str(folder)]
            subprocess.run(line, check=True)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_a_disk_that_is_full_in_training(bench: Bench, small_disk: Callable[[int], Path]) -> None:
    # Room for the conversion and the data (0.8 MiB), and for a checkpoint (1.2 MiB) and a half.
    out = small_disk(2600) / "out"
    argv = bench.command(out)
    code = bench.run.run(argv, fast=True)
    assert code == 1, bench.run.said
    (line,) = error_lines(bench.run.said)
    assert "disk full" in line
    assert "same command" in line
    (only,) = (out / ".work/trainer").glob("checkpoint-*")
    assert whole_checkpoints(out / ".work/trainer") == [only]
    small_disk(8000)
    assert bench.run.run(argv, fast=True) == 0, bench.run.said
    assert "resuming from step" in bench.run.said
    bench.ends_as_undisturbed(out)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_an_older_checkpoint_makes_room(bench: Bench, small_disk: Callable[[int], Path]) -> None:
    out = small_disk(4000) / "out"
    argv = bench.command(out, training__save_steps=1)
    assert bench.run.run(argv, fast=True, signal_at=12) == 130, bench.run.said
    assert [path.name for path in whole_checkpoints(out / ".work/trainer")] == [
        "checkpoint-12",
        "checkpoint-11",
    ]


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "optimizer cut": lambda path: os.truncate(path / "optimizer.pt", 1000),
    "weights empty": lambda path: os.truncate(next(path.glob("*.safetensors")), 0),
    "rng missing": lambda path: (path / "rng_state.pth").unlink(),
    "state zeroed": lambda path: (path / "trainer_state.json").write_bytes(
        bytes((path / "trainer_state.json").stat().st_size)
    ),
    "optimizer zeroed": lambda path: (path / "optimizer.pt").write_bytes(
        bytes((path / "optimizer.pt").stat().st_size)
    ),
    "marker cut": lambda path: os.truncate(path / COMPLETE_MARKER, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_checkpoint_before_stands_in_for_a_broken_one(
    breakage: str, bench: Bench, tmp_path: Path
) -> None:
    out, argv = tmp_path / "out", bench.command(tmp_path / "out")
    assert bench.run.run(argv, fast=True, signal_at=10) == 130
    newest, before = whole_checkpoints(out / ".work/trainer")
    BREAKAGES[breakage](newest)
    assert bench.run.run(argv, fast=True) == 0, bench.run.said
    assert re.search(rf"warning: {newest.name} cannot be read \(.+\)", bench.run.said)
    assert f"resuming from step {before.name.split('-')[1]}" in bench.run.said
    bench.ends_as_undisturbed(out)


@pytest.mark.slow
def test_what_a_run_keeps_and_shows_may_change_in_between(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for keep, step in ((1, 9), (3, 15)):
        argv = bench.command(out, training__keep_checkpoints=keep, training__save_steps=2)
        assert bench.run.run(argv, fast=True, signal_at=step) == 130, bench.run.said
        assert len(list((out / ".work/trainer").glob("checkpoint-*"))) == keep
    changed = bench.command(out, training__learning_rate="1e-3")
    assert bench.run.run(changed, fast=True) == 1
    assert "different recipe" in bench.run.said
