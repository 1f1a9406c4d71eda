"""Several machines and real signals: who finds whom, who waits how long, which code it ends with.

Machines are launchers on one loopback address; what they start is forked or is plain Python.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import SourceFactory
from forks import Forked
from typer.testing import CliRunner

from dllm_convert.errors import DllmConvertError, RequestError
from dllm_convert.pipeline.launch import Machine, exit_code, launcher_arguments
from dllm_convert.planning.launch import Launch

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes/launch"


@pytest.mark.parametrize(
    ("config", "rank", "address", "found"),
    [
        (None, 1, "10.0.0.1", Machine(1, "10.0.0.1", 29500)),
        (None, 0, "node-7:4000", Machine(0, "node-7", 4000)),
        (None, 0, "[fe80::1]:4000", Machine(0, "fe80::1", 4000)),
        ("multi-node", None, None, Machine(0, "10.0.0.1", 29500)),
        ("multi-node", 1, None, Machine(1, "10.0.0.1", 29500)),
        ("multi-node", 1, "other:7", Machine(1, "other", 7)),
        (None, None, "10.0.0.1", "found None, expected 0 to 1"),
        (None, 2, "10.0.0.1", "expected 0 to 1"),
        (None, -1, "10.0.0.1", "expected 0 to 1"),
        (None, 0, None, "where all of them meet"),
        (None, 0, "", "no HOST"),
        (None, 0, "a b", "no HOST"),
        (None, 0, "host:99999", "no HOST"),
        (None, 0, "host:", "no HOST"),
        (None, 0, "http://host:1", "no HOST"),
    ],
)
def test_where_a_machine_stands(
    config: str | None, rank: int | None, address: str | None, found: Machine | str
) -> None:
    path = None if config is None else CONFIGS / f"{config}.yaml"
    asked = Launch.asked(4, path, 2, environment={})
    if isinstance(found, Machine):
        assert Machine.asked(asked, rank, address) == found
        return
    with pytest.raises(RequestError, match=found):
        Machine.asked(asked, rank, address)


def test_one_machine_has_no_number() -> None:
    alone = Launch.asked(4, environment={})
    assert Machine.asked(alone) == Machine()
    for wrong in ({"rank": 0}, {"address": "host"}):
        with pytest.raises(RequestError, match="would change nothing"):
            Machine.asked(alone, **wrong)  # type: ignore[arg-type]


def test_the_command_line_refuses_a_machine_among_none(source_cache: SourceFactory) -> None:
    from dllm_convert.cli.app import app

    options = (["--machine-rank", "0"], ["--main-address", "a"], ["--num-machines", "2"])
    for option in options:
        result = CliRunner().invoke(
            app, ["run", str(source_cache("llama")), *option, "--to", "mdlm"]
        )
        assert result.exit_code == 2, result.output
        assert option[0] in result.stderr or "--num-processes" in result.stderr


@pytest.mark.parametrize("config", [None, "ddp", "fsdp2", "multi-node", "zero3"])
def test_accelerate_starts_what_was_asked_for(config: str | None) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = None if config is None else CONFIGS / f"{config}.yaml"
    asked = Launch.asked(6, path, 2, environment={})
    line = launcher_arguments(asked, Machine(1, "10.0.0.9", 4000))
    args = launch_command_parser().parse_args([*line, "--module", "dllm_convert"])
    args, _, _ = _validate_launch_command(args)
    assert (args.num_processes, args.num_machines, args.machine_rank) == (6, 2, 1)
    assert (args.main_process_ip, args.main_process_port) == ("10.0.0.9", 4000)
    assert args.rdzv_backend == "static"
    if config == "zero3":
        # Its own launchers, pdsh among them, start other programs than torchrun.
        assert args.deepspeed_multinode_launcher == "standard"


class Failed:
    def __init__(self, code: int) -> None:
        self.exitcode = code

    def get_first_failure(self) -> tuple[int, Failed]:
        return 3, self


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, 1),
        (3, 3),
        (130, 130),
        (-signal.SIGTERM, 130),
        (-signal.SIGHUP, 130),
        (-signal.SIGINT, 130),
    ],
)
def test_the_code_is_that_of_the_first_to_fail(code: int, said: int) -> None:
    assert exit_code(Failed(code)) == said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_what_was_killed_was_not_asked_to_end(number: signal.Signals) -> None:
    """A job whose memory is short is not to be put back into the queue for ever."""
    with pytest.raises(DllmConvertError, match=f"process 3 was ended by {number.name}") as caught:
        exit_code(Failed(-number))
    assert caught.value.exit_code == 1


STARTS = """
import sys
from dllm_convert.cli.errors import classify
from dllm_convert.common.interruption import Interruption
from dllm_convert.errors import DllmConvertError
from dllm_convert.pipeline.launch import Machine, launch
from dllm_convert.planning.launch import Launch
asked = Launch(2, {machines}, "ddp")
machine = Machine({rank}, "127.0.0.1", {port}) if {machines} > 1 else Machine()
try:
    # As the command line listens to signals before and after.
    with Interruption(gently=False):
        sys.exit(launch(asked, {command}, module="stands_in", machine=machine))
except DllmConvertError as error:
    sys.stderr.write(str(error))
    sys.exit(classify(error).exit_code)
"""
STANDS_IN = """
import os, pathlib, signal, sys, time
how, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank = os.environ["RANK"]
def end(number, frame):
    if how == "stubborn":
        return
    time.sleep(2.5)
    (folder / f"saved-{rank}").touch()
    os._exit(130)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
(folder / f"begun-{rank}").write_text(str(os.getpid()))
if how == "fails" and rank == "1":
    sys.exit(3)
while True:
    time.sleep(0.05)
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Starts launchers of a program that stands in for ours; ends what is left of it."""
    (tmp_path / "stands_in.py").write_text(STANDS_IN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # The stock agent would kill after a second.
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "1"
    running: list[Forked] = []

    def start(how: str, *, machines: int = 1, rank: int = 0, port: int = 0) -> Forked:
        command = [how, str(tmp_path)]
        code = STARTS.format(machines=machines, rank=rank, port=port, command=command)
        process = forks.start([sys.executable, "-c", code], env=environment, cwd=ROOT)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
    for path in tmp_path.glob("begun-*"):
        try:
            os.kill(int(path.read_text() or 0) or 1 << 22, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until_begun(folder: Path, *processes: Forked, many: int = 2) -> None:
    deadline = time.monotonic() + 60
    while sum(bool(path.read_text()) for path in folder.glob("begun-*")) < many:
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_waits_for_those_that_save(number: int, started: Any, tmp_path: Path) -> None:
    process = started("saves")
    wait_until_begun(tmp_path, process)
    process.send_signal(number)
    # What Slurm sends to the launcher comes once more through srun.
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_second_signal_ends_at_once_what_does_not_end(started: Any, tmp_path: Path) -> None:
    process = started("stubborn")
    wait_until_begun(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    for path in tmp_path.glob("begun-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_a_failure_ends_the_others_with_its_code(started: Any, tmp_path: Path) -> None:
    process = started("fails")
    process.communicate(timeout=60)
    assert process.returncode == 3


def test_a_killed_process_is_a_failure_that_is_told(started: Any, tmp_path: Path) -> None:
    process = started("saves")
    wait_until_begun(tmp_path, process)
    os.kill(int((tmp_path / "begun-1").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1 was ended by SIGKILL" in err


def test_a_machine_that_waits_for_others_can_be_stopped(started: Any, tmp_path: Path) -> None:
    """Python's own handlers do not run while torch waits for a rendezvous."""
    process = started("saves", machines=2, rank=0, port=free_port())
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_two_machines_start_one_run(started: Any, tmp_path: Path) -> None:
    port = free_port()
    both = [started("saves", machines=2, rank=rank, port=port) for rank in (0, 1)]
    wait_until_begun(tmp_path, *both)
    for process in both:
        process.send_signal(signal.SIGTERM)
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 130
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


SRUN = """#!/bin/bash
# As srun does: one task a machine, each with its number; ends with the largest code.
for node in 0 1; do SLURM_NODEID=$node "$@" || code=$?; done
exit ${code:-0}
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "$@" >> "$SEEN/requeued"; fi
"""
CONVERT = """#!/bin/bash
printf '%s\\n' "$@" > "$SEEN/command-$SLURM_NODEID"
exit "$CODE"
"""


@pytest.mark.parametrize("code", [0, 1, 130])
def test_slurm_requeues_what_was_stopped(code: int, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("dllm-convert", CONVERT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SEEN": str(tmp_path),
        "CODE": str(code),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "77",
    }
    script = str(CONFIGS / "slurm.sh")
    line = ["bash", script, "qwen2.5-7b", "--full", "--out", "/shared/a b"]
    assert subprocess.run(line, env=environment).returncode == code
    requeued = tmp_path / "requeued"
    assert requeued.exists() is (code == 130)
    if code == 130:
        assert requeued.read_text() == "requeue 77\n"
    for rank in (0, 1):
        command = (tmp_path / f"command-{rank}").read_text().splitlines()
        assert command[:5] == ["run", "qwen2.5-7b", "--full", "--out", "/shared/a b"]
        options = dict(zip(command[5::2], command[6::2], strict=True))
        path = Path(options["--launch-config"])
        assert path == Path("recipes/launch/multi-node.yaml")
        asked = Launch.asked(
            int(options["--num-processes"]),
            ROOT / path,
            int(options["--num-machines"]),
            environment={},
        )
        assert (asked.processes, asked.machines) == (16, 2)
        machine = Machine.asked(asked, int(options["--machine-rank"]), options["--main-address"])
        assert machine == Machine(rank, "first", 29500)


@pytest.mark.slow
def test_one_machine_is_stopped_and_both_go_on(source_cache: SourceFactory, tmp_path: Path) -> None:
    out, port = tmp_path / "out", free_port()
    line = [
        "run", str(source_cache("llama", tied=True)), "--to", "mdlm", "--out", str(out), "--full",
        "--data", "pydoc", "--allow-epochs", "--num-processes", "2", "--num-machines", "2",
        "--main-address", f"127.0.0.1:{port}", "--verify", "files",
    ]  # fmt: skip
    settings: dict[str, Any] = {
        "data.sequence_length": 32, "data.max_documents": 20, "data.held_out_sequences": 4,
        "training.precision": "fp32", "generation.max_new_tokens": 4,
    }  # fmt: skip
    line += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]

    def start(*more: str) -> list[Forked]:
        hook = ("forks:fork_ranks", {"pids": os.devnull})
        return [
            forks.start(
                [sys.executable, "-m", "dllm_convert", *line, *more, "--machine-rank", str(rank)],
                cwd=ROOT, before=[hook],
            )
            for rank in (0, 1)
        ]  # fmt: skip

    metrics = out / ".work/metrics.jsonl"
    both = start("--steps", "3000")
    deadline = time.monotonic() + 120
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert all(process.poll() is None for process in both), [p.communicate() for p in both]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert err.count("error: interrupted") == (process is both[0])
    steps = [int(path.parent.name.split("-")[1]) for path in out.glob(".work/trainer/*/complete")]
    last = max(steps)
    assert last >= 3
    both = start("--steps", "3000")
    while json.loads(metrics.read_text().splitlines()[-1])["step"] <= last:
        assert all(process.poll() is None for process in both), [p.communicate() for p in both]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in both:
        process.send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [130, 130], told
    assert f"resuming from step {last}" in told[0]
