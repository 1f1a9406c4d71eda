"""Real commands on tiny checkpoints, forked out of one warm process, with faults planted."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import forks
from forks import Forked

SETTINGS: dict[str, object] = {
    "data.sequence_length": 32,
    "data.max_documents": 40,
    # Some train until they are killed.
    "data.allow_epochs": "true",
    "data.held_out_sequences": 4,
    "training.batch_size": 2,
    "training.precision": "fp32",
    "training.learning_rate": "5e-3",
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
    """Starts commands in forks of a warm process, by default into one log."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "run.log"
        self._running: dict[int, Forked] = {}

    def start(self, argv: list[str], *, log: Path | None = None, **faults: Any) -> int:
        """Start a command with faults planted (`faults.py`) and return its process id."""
        line = [sys.executable, "-m", "dllm_convert", *argv]
        hooks = [("faults:plant", faults)] if faults else []
        process = forks.start(line, before=hooks, log=log or self.log)
        self._running[process.pid] = process
        return process.pid

    def wait(self, pid: int) -> int:
        return self._running.pop(pid).wait(120)

    def run(self, argv: list[str], **faults: Any) -> int:
        return self.wait(self.start(argv, **faults))

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def wait_until(folder: Path, pattern: str, seconds: float = 60) -> Path:
    deadline = time.monotonic() + seconds
    while not (found := sorted(folder.glob(pattern))):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.005)
    return found[0]
