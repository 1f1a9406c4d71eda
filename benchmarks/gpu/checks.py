"""What a phase consists of, and how it is run: a check that breaks leaves the next ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.devices import release
from benchmarks.gpu.table import Results


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        out: Folder of what is written.
        tiny: Tiny models, to run all of this on a CPU.
        weights: An untrained conversion for the phase `quality`.
        data: Text for it.
    """

    out: Path
    tiny: bool = False
    weights: Path | None = None
    data: str = "pydoc"


@dataclass(frozen=True)
class Check:
    """One thing that is looked at.

    Attributes:
        what: How its line is called where it adds none itself.
        run: Looks, and adds lines.
        may_not_fit: Whether a full memory is no fault.
    """

    what: str
    run: Callable[[], None]
    may_not_fit: bool = False


def run_checks(group: str, checks: Iterable[Check], results: Results, until: float) -> None:
    """Run the checks of a phase one after the other.

    Args:
        group: The phase.
        checks: What to run.
        results: Where lines go.
        until: Time by `time.monotonic` after which none begins.
    """
    for check in checks:
        if time.monotonic() > until:
            results.left_out(group, check.what, "the phase's time was up")
            continue
        release()
        try:
            check.run()
        # What CUDA, its compilers and a full memory raise: the next check has to be seen, too.
        except RuntimeError as error:
            if check.may_not_fit and isinstance(error, torch.OutOfMemoryError):
                results.left_out(group, check.what, "out of memory")
            else:
                results.broke(group, check.what, f"{type(error).__name__}: {error}")
