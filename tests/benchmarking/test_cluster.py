"""`python -m benchmarks.cluster`: two machines of one process each, and failures that it finds."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest

from benchmarks.cluster import __main__ as cluster
from benchmarks.cluster.__main__ import KILLED, SAVED, Finding, check
from dllm_convert.cli.errors import classify
from dllm_convert.common.json_files import write_json
from dllm_convert.errors import DllmConvertError

ROOT = Path(__file__).parents[2]
NETWORK: dict[str, Any] = {
    "hosts": ["a (0)", "a (0)", "b (1)", "b (1)"],
    "backend": "gloo",
    "device": "cpu",
    "all_reduce_latency": 2e-4,
    "all_reduce_bytes_per_second": 5e9,
    "within_bytes_per_second": 9e9,
    "between_bytes_per_second": 1.5e9,
    "step_alone": 0.3,
    "step_together": 0.4,
    "waiting": 0.25,
}


class Cluster:
    """Starts nothing, and leaves what a run would."""

    def __init__(self, out: Path, **faults: Any) -> None:
        self.out, self.faults, self.lines = out, faults, list[list[str]]()

    def start(self, line: list[str], phase: int) -> int:
        self.lines.append(line)
        work = self.out / "run/.work"
        if phase == 0:
            write_json(self.out / "network.json", NETWORK)
        elif phase == 1 and not self.faults.get("survives"):
            saved = work / f"trainer/checkpoint-{self.faults.get('saved', SAVED)}"
            saved.mkdir(parents=True, exist_ok=True)
            for path in work.glob("trainer/*"):
                (path / "complete").touch()
            said = {"rank": 3, "step": KILLED, "time": time.time()}
            write_json(self.out / "killed.json", said)
        elif phase == 2:
            work.mkdir(parents=True, exist_ok=True)
            steps = self.faults.get("steps", range(1, 11))
            curve = "".join(f"{json.dumps({'step': step})}\n" for step in steps)
            (work / "metrics.jsonl").write_text(curve)
            passed = self.faults.get("passed", True)
            write_json(self.out / "run/dllm_convert.json", {"verification": {"passed": passed}})
        return int(self.faults.get("codes", [0, 1, 0])[phase])


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cluster, "make_source", lambda *_: None)
    return tmp_path


def look(out: Path, *, main: bool = True, **faults: Any) -> tuple[list[Finding], Cluster]:
    fake = Cluster(out, **faults)
    if not main:
        (out / "ready").touch()
    found = check(out, fake.start, main=main, model="tiny", steps=10, verify="files")
    return found, fake


def test_all_is_fine(out: Path) -> None:
    found, fake = look(out)
    assert {one.fine for one in found} == {None, True}
    said = {one.question: one.found for one in found}
    assert said["share of a step spent waiting"] == "25%"
    assert said["one to one, between machines"] == "1.5 GB/s"
    assert said["a process is killed"].startswith("process 3 after step 6")
    assert said["checkpoint to go on from"] == "step 4"
    # The same command, but for the death.
    killed, resumed = fake.lines[1:]
    assert killed[2] == str(KILLED)
    assert resumed[2] == "0"
    assert killed[3:] == resumed[3:]
    other, _ = look(out, main=False)
    assert len(other) < len(found)
    assert {one.fine for one in other} == {True}


@pytest.mark.parametrize(
    ("faults", "question"),
    [
        ({"codes": [1, 1, 0]}, "the processes find each other"),
        ({"survives": True}, "a process is killed"),
        ({"codes": [0, 0, 0]}, "a process is killed"),
        ({"codes": [0, 130, 0]}, "a process is killed"),
        ({"saved": 2}, "checkpoint to go on from"),
        ({"codes": [0, 1, 1]}, "the same command goes on"),
        ({"steps": [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]}, "the same command goes on"),
        ({"steps": [1, 2, 3, 4, 7, 8, 9, 10]}, "the same command goes on"),
        ({"steps": []}, "the same command goes on"),
        ({"passed": False}, "the result is verified"),
    ],
)
def test_what_goes_wrong_is_found(faults: dict[str, Any], question: str, out: Path) -> None:
    found, _ = look(out, **faults)
    assert question in [one.question for one in found if one.fine is False]


def test_a_folder_that_is_not_shared_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_WAIT_S", 0.2)
    with pytest.raises(DllmConvertError, match="machine 0 wrote nothing"):
        check(out, Cluster(out).start, main=False, model="tiny", steps=10, verify="files")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "6"], "more than 6 steps"),
        (["--num-processes", "1"], "2 processes"),
        (["--num-machines", "2", "--main-address", "h"], "expected 0 to 1"),
        (["--num-machines", "3"], "cannot be shared out"),
        (["--launch-config", "none.yaml"], "no such file"),
        ([], "is not empty"),
    ],
)
def test_a_wrong_request_is_refused(
    more: list[str], said: str, out: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (out / "something").touch()
    line = ["cluster", "--num-processes", "2", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", line)
    assert cluster.main() == 2
    assert said in capsys.readouterr().err


def free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody listens at."""
    while True:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            first = int(listening.getsockname()[1])
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return first
        except (OSError, OverflowError):
            continue


@pytest.mark.slow
def test_two_machines(tmp_path: Path) -> None:
    out, address = tmp_path / "out", f"127.0.0.1:{free_ports(3)}"
    line = [
        sys.executable, "-m", "benchmarks.cluster", "--num-processes", "2", "--num-machines", "2",
        "--main-address", address, "--out", str(out), "--model", "tiny", "--verify", "files",
    ]  # fmt: skip
    hook = ("forks:fork_ranks", {"pids": os.devnull})
    both = [
        forks.start([*line, "--machine-rank", str(rank)], cwd=ROOT, before=[hook])
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    found = {one["question"]: one for one in json.loads((out / "cluster.json").read_text())}
    assert found["the result is verified"]["found"] == "passed"
    assert found["the same command goes on"]["found"] == "to step 10"
    assert "process 1 was ended by SIGKILL" in told[1][1]
    # Whoever is left says so in a line, not in a traceback.
    assert "another process of the training is gone" in told[0][1]
    assert "Traceback" not in told[0][1] + told[1][1]


def test_a_lost_process_is_a_known_failure() -> None:
    from torch import distributed

    gloo = RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")
    for error in (gloo, distributed.DistBackendError("x"), distributed.DistNetworkError("x")):
        failure = classify(error)
        assert failure is not None
        assert failure.exit_code == 1
        assert "another process" in failure.message
    assert classify(RuntimeError("size mismatch")) is None
