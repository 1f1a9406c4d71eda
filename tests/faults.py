"""Faults planted in the process of a run, before it begins (a hook of `forks.py`).

- `kill_at`: SIGKILL at the n-th change of a file below `below` (open for writing, rename, removal,
  link), counted by the interpreter's own audit events. With 0 they are counted into `count`.
- `tear`: SIGKILL inside the n-th write of a `torch.save` or safetensors file, half of it written.
- `signal_at`: SIGTERM to itself in the n-th optimizer step.
- `hang_in_save`: the first `torch.save` makes the file `.work/hanging` and goes on for an hour.
- `fast`: leaves out what is measured and drawn of a finished model.
- `file_bytes`: a limit on the size of a file, as a full disk fails a write half-way.
- `hurry`: no sleep lasts: backing off is the Hub's client's, waiting for it proves nothing more.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir", "os.truncate")


class Counter:
    """Counts changes of files below a folder and dies at the one it was told."""

    def __init__(self, below: str, kill_at: int, count: str | None) -> None:
        self.below, self.kill_at, self.count = below, kill_at, count
        self.seen: list[str] = []
        self.busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy or not self._changes(event, arguments):
            return
        self.busy = True
        self.seen.append(f"{event} {arguments[0]}")
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count:
            with Path(self.count).open("a") as file:
                file.write(self.seen[-1].replace(self.below, "") + "\n")
        self.busy = False

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if not arguments or self.below not in str(arguments[0]):
            return False
        if event == "open":
            return bool(isinstance(arguments[2], int) and arguments[2] & WRITING)
        return event in CHANGES


def tear(number: int) -> None:
    """Die in the middle of the n-th file that torch or safetensors write for the Trainer."""
    import safetensors.torch
    import torch
    from transformers import modeling_utils

    calls = 0
    real_save, real_safe = torch.save, safetensors.torch.save_file

    def reached(write: Callable[[Path], None], file: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls != number:
            return False
        write(Path(file))
        os.truncate(file, Path(file).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    def save(value: Any, file: Any, *rest: Any, **keywords: Any) -> None:
        if not reached(lambda path: real_save(value, path), file):
            real_save(value, file, *rest, **keywords)

    def save_file(tensors: Any, file: Any, *rest: Any, **keywords: Any) -> None:
        if not reached(lambda path: real_safe(tensors, path), file):
            real_safe(tensors, file, *rest, **keywords)

    torch.save = save
    modeling_utils.safe_save_file = save_file


def signal_at(step: int) -> None:
    from dllm_convert.training.trainer import DiffusionTrainer

    real = DiffusionTrainer.compute_loss

    def compute_loss(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments, **keywords)

    DiffusionTrainer.compute_loss = compute_loss


def hang_in_save() -> None:
    import time

    import torch

    def save(value: Any, file: Any, *rest: Any, **keywords: Any) -> None:
        (Path(file).parents[2] / "hanging").touch()
        time.sleep(3600)

    torch.save = save


def plant(**faults: Any) -> None:
    """Plant faults in this process."""
    if "kill_at" in faults:
        sys.addaudithook(Counter(faults["below"], faults["kill_at"], faults.get("count")))
    if "tear" in faults:
        tear(faults["tear"])
    if "signal_at" in faults:
        signal_at(faults["signal_at"])
    if faults.get("hang_in_save"):
        hang_in_save()
    if "file_bytes" in faults:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_bytes"], resource.RLIM_INFINITY))
    if faults.get("fast"):
        fast()
    if faults.get("hurry"):
        hurry()


def fast() -> None:
    """Leave out what is measured and drawn of a finished model: other tests look at that."""
    from dllm_convert.card import pictures
    from dllm_convert.verification import run

    left_out = run._Group(lambda subject: [])
    kept = ("files", "tokens", "generate", "quality")
    run._GROUPS = {n: g if n in kept else left_out for n, g in run._GROUPS.items()}
    pictures._figure = lambda picture, seen: None


def hurry() -> None:
    import time

    real = time.sleep
    time.sleep = lambda seconds: real(min(seconds, 0.01))
