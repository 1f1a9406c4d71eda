"""What each process of `python -m benchmarks.cluster` does, started by our launcher.

network OUT MODEL     measures what processes exchange, into OUT/network.json
train OUT KILL LINE   trains as `dllm-convert LINE`; the last process dies after KILL steps
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.devices import current_device, settle
from dllm_convert.common.json_files import write_json
from dllm_convert.common.ranks import Rank

LARGE, SMALL = 1 << 26, 8
"""Bytes of an exchange that is ruled by bandwidth, and of one that is ruled by latency."""
_ROUNDS = 5
_ROWS, _LENGTH = 2, 128


def synchronized_seconds(call: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Return the median seconds of a call that all processes make, but for the first."""
    taken = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        call()
        settle()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _exchanged(size: int, device: torch.device) -> float:
    """Return the seconds of summing up so many bytes over all processes."""
    numbers = torch.ones(max(size // 4, 1), device=device)
    return synchronized_seconds(lambda: dist.all_reduce(numbers))


def _sent(first: int, second: int, device: torch.device) -> float:
    """Return bytes per second that one process sends to another; all processes call this."""
    numbers, rank = torch.ones(LARGE // 4, device=device), dist.get_rank()

    def send() -> None:
        if rank == first:
            dist.send(numbers, second)
        elif rank == second:
            dist.recv(numbers, first)
        # The sender may be done when nothing has arrived.
        dist.barrier()

    return LARGE / synchronized_seconds(send)


def _steps(model_name: str, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step of one process alone, and of one that all of them take."""
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.gpu.models import SIZES, build

    model = build(model_name, None, device=device).train()
    ids = [device.index or 0] if device.type != "cpu" else None
    together: Any = DistributedDataParallel(model, device_ids=ids)
    tokens = torch.randint(SIZES[model_name].vocab_size, (_ROWS, _LENGTH), device=device)

    def step(*, alone: bool) -> None:
        with together.no_sync() if alone else nullcontext():
            together(input_ids=tokens, labels=tokens).loss.backward()
        together.zero_grad()

    alone = synchronized_seconds(lambda: step(alone=True))
    return alone, synchronized_seconds(lambda: step(alone=False))


def network(out: Path, model: str) -> None:
    """Measure what the processes exchange; the first writes it down."""
    place, local = Rank.from_environment(), int(os.environ["LOCAL_RANK"])
    accelerated = torch.accelerator.is_available()
    if accelerated:
        torch.accelerator.set_device_index(local)
    device = current_device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world, each = place.world, int(os.environ["LOCAL_WORLD_SIZE"])
    latency = _exchanged(SMALL, device)
    seconds = _exchanged(LARGE, device)
    # Of a ring each process sends and receives all but its own part, twice.
    ring = 2 * (world - 1) / world * LARGE / seconds
    alone, together = _steps(model, device)
    found = {
        "backend": dist.get_backend(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "all_reduce_latency": latency,
        "all_reduce_bytes_per_second": ring,
        "within_bytes_per_second": _sent(0, 1, device) if each > 1 else None,
        "between_bytes_per_second": _sent(0, each, device) if world > each else None,
        "step_alone": alone,
        "step_together": together,
        "waiting": max(0.0, 1 - alone / together),
    }
    hosts: list[Any] = [None] * world
    dist.all_gather_object(hosts, f"{socket.gethostname()} ({os.environ['GROUP_RANK']})")
    if place.main:
        write_json(out / "network.json", found | {"hosts": hosts})
    dist.destroy_process_group()


def _die_after(steps: int, out: Path) -> None:
    """Have this process killed, as by a system without memory, after so many optimizer steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken = 0

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == steps:
            rank = Rank.from_environment().rank
            said = {"rank": rank, "step": steps, "time": time.time()}
            (out / "killed.json").write_text(json.dumps(said), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


def train(out: Path, kill: int, line: list[str]) -> None:
    """Be a process of `dllm-convert`; the last one dies if it is to."""
    place = Rank.from_environment()
    if kill and place.rank == place.world - 1:
        _die_after(kill, out)
    from dllm_convert.cli.app import main as command

    sys.argv = ["dllm-convert", *line]
    command()


def main() -> None:
    """Do what the launcher says."""
    what, out = sys.argv[1], Path(sys.argv[2])
    if what == "network":
        network(out, sys.argv[3])
    else:
        train(out, int(sys.argv[3]), sys.argv[4:])


if __name__ == "__main__":
    main()
