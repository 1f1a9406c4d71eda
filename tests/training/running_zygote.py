"""A process that has imported everything once and forks a real command for every run.

Reads one JSON object a line from stdin. `{"start": {...}}` forks `dllm-convert` with `argv`, its
output into the file `log`, and prints its pid; `{"wait": pid}` prints that child's exit code,
negative if a signal ended it. Faults are planted in the child only:

- `kill_at`: SIGKILL at the n-th change of a file below `below` (open for writing, rename, removal,
  link), counted by the interpreter's own audit events. With 0 they are counted into `count`.
- `tear`: SIGKILL inside the n-th write of a `torch.save` or safetensors file, half of it written.
- `signal_at`: SIGTERM to itself in the n-th optimizer step.
- `hang_in_save`: the first `torch.save` makes the file `.work/hanging` and goes on for an hour.
- `fast`: leaves out the one probe that starts a new interpreter.
- `file_bytes`: a limit on the size of a file, as a full disk fails a write half-way.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = (
    "accelerate", "datasets", "peft", "torch", "transformers", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "dllm_convert.cli", "dllm_convert.pipeline",
    "dllm_convert.training.run", "dllm_convert.verify", "dllm_convert.card", "dllm_convert.weights",
    "dllm_convert.sampling.run", "dllm_convert.report_page", "dllm_convert.licences",
    "transformers.models.llama.modeling_llama", "torch.utils.data", "jinja2",
)  # fmt: skip
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


def child(order: dict[str, Any]) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "kill_at" in order:
        sys.addaudithook(Counter(order["below"], order["kill_at"], order.get("count")))
    if "tear" in order:
        tear(order["tear"])
    if "signal_at" in order:
        signal_at(order["signal_at"])
    if order.get("hang_in_save"):
        hang_in_save()
    if "file_bytes" in order:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], resource.RLIM_INFINITY))
    if order.get("fast"):
        # What is measured and drawn of a finished model is other tests' business: here it only has
        # to come out the same after any kill.
        from dllm_convert import pictures
        from dllm_convert.verify import run

        left_out = run._Group(lambda subject: [])
        kept = ("files", "tokens", "generate", "quality")
        run._GROUPS = {n: g if n in kept else left_out for n, g in run._GROUPS.items()}
        pictures._figure = lambda picture, seen: None
    from dllm_convert.cli import app

    try:
        app(order["argv"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def start(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = child(order)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            answer = start(order["start"])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
