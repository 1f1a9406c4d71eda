"""Real commands on tiny checkpoints, forked out of one warm process; see running_zygote.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dllm_convert

PACKAGE = Path(dllm_convert.__file__).parents[1]
ZYGOTE = Path(__file__).with_name("running_zygote.py")
SETTINGS: dict[str, object] = {
    "data.sequence_length": 32,
    "data.max_documents": 40,
    "data.held_out_sequences": 4,
    "training.batch_size": 2,
    "training.precision": "fp32",
    "training.learning_rate": "5e-3",
    "training.lora.learning_rate": "5e-3",
    "training.save_steps": 4,
    "generation.max_new_tokens": 8,
}


def command(source: Path, out: Path, *more: str, **settings: object) -> list[str]:
    """Return the arguments of a short run; settings by their name with `__` for the dot."""
    chosen = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    flags = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    return [
        "run", str(source), "--to", "bd3lm", "--block", "8", "--out", str(out), "--data", "pydoc",
        *flags, *more,
    ]  # fmt: skip


class Launcher:
    """Starts commands in forks of a warm process."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self.log = folder / "run.log"

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, argv: list[str], **faults: Any) -> int:
        order = {"argv": argv, "log": str(self.log), **faults}
        Path(order["log"]).unlink(missing_ok=True)
        return self._ask({"start": order})

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def run(self, argv: list[str], **faults: Any) -> int:
        return self.wait(self.start(argv, **faults))

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@contextmanager
def launcher(folder: Path, **environment: str) -> Iterator[Launcher]:
    process = subprocess.Popen(
        [sys.executable, str(ZYGOTE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE), **environment},
    )
    try:
        yield Launcher(process, folder)
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait(60)


def wait_until(folder: Path, pattern: str, seconds: float = 60) -> Path:
    deadline = time.monotonic() + seconds
    while not (found := sorted(folder.glob(pattern))):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.005)
    return found[0]
