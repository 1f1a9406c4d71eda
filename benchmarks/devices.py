"""Where a benchmark runs, and how it is timed there: a device works on while the host goes on."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark its option --device."""
    parser.add_argument(
        "--device", choices=["auto", "cpu"], default="auto", help="auto: the GPU if there is one"
    )


def chosen_device(options: argparse.Namespace) -> torch.device:
    """Return where to run; call it before anything looks for a GPU.

    The package takes the accelerator that it sees, so `--device cpu` hides those there are.
    """
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return current_device()


def current_device() -> torch.device:
    """Return the accelerator that is seen, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def settle() -> None:
    """Wait until the device has done what it was sent; nothing on a CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(run: Callable[[], Result]) -> tuple[float, Result]:
    """Wall time of a run, the device's work included, and what it returned."""
    settle()
    started = time.perf_counter()
    result = run()
    settle()
    return time.perf_counter() - started, result


def median_seconds(run: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    """Median wall time of a run, after some that warm up."""
    for _ in range(warm):
        run()
    return statistics.median(seconds(run)[0] for _ in range(repeats))


def release() -> None:
    """Give back what nobody holds any more, and begin to count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def held_bytes() -> int:
    """Bytes in use: of the GPU those of tensors, else of this process; the peak starts here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What was freed, such as gradients, is not to count as held.
    ctypes.CDLL(None).malloc_trim(0)
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return held


def peak_bytes() -> int:
    """Most bytes in use since the last `held_bytes` or `release`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")
