"""What the mutations damage: sources, their conversions, text and tasks; and the forking."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
from card_cases import llama_bd3lm
from factory import make_source, prose
from fuzz_program import FAMILIES
from hub_server import LoopbackHub
from pushing import TOKEN, checkpoint
from tasks_on_disk import write_tasks

MODULES = (*forks.PACKAGE, "lm_eval:simple_evaluate", "yaml", "typer.testing", "pyarrow.parquet")
GIVEN_UP = 4 * 3600
"""Seconds after which the process is ended; each command has limits of its own."""
PROGRAM = Path(__file__).with_name("fuzz_program.py")


def prepare(root: Path) -> None:
    """Write for each family a source and its conversion, and what they are evaluated on."""
    for family, target in FAMILIES.items():
        make_source(root / family, family)
        checkpoint(root / family, root / f"{family}-out", target, **_recorded())
    (root / "text.txt").write_text("\n\n".join(prose(60)))
    (root / "tasks").mkdir()
    write_tasks(root / "tasks")


def _recorded() -> dict[str, Any]:
    """Return what a manifest holds of a run that trained, measured, sampled and was evaluated."""
    run = llama_bd3lm()
    mean = {"items": 10, "value": 0.5, "half_width": 0.1}
    line = {"task": "capitals", "metric": "acc", "after": mean, "before": mean, "difference": mean}
    swept = {**mean, "task": "writing", "metric": "exact_match", "tokens_per_second": 3.0}
    return {
        "measurements": run["measurements"],
        "sample": run["sample"],
        "verification": run["verification"],
        "evaluation": {
            "format_version": 1,
            "settings": {"draws": 4, "rounds": 2},
            "results": [line],
            "tasks": {"capitals": {"shots": 0}},
            "sweep": [{**swept, "threshold": t, "tokens_per_forward": 2 - t} for t in (0.5, 0.9)],
            "effort": {"after": {"tokens_per_forward": 2.0, "tokens_per_second": 9.0}},
            "text": {"source": "a.txt", "nelbo": {"nats_per_token": 4.0}, "nll": None},
        },
    }


def fuzz(
    hub: LoopbackHub, prepared: Path, kind: str, first: int, count: int, log: Path
) -> subprocess.CompletedProcess[str]:
    """Feed mutations to the commands in a process of their own."""
    home = log.with_name("home")
    hub.add_user("me", TOKEN)
    line = [sys.executable, str(PROGRAM), str(prepared), kind, str(first), str(count), str(log)]
    environment = hub.environment(home, TOKEN) | {"OMP_NUM_THREADS": "1"}
    strangers = ("forks:fork_strangers", {"address": forks.FORKS.strangers()})
    # Whatever a command records lies beside the log, not where the tests were started.
    return forks.run(
        line,
        env=environment,
        cwd=log.parent,
        modules=MODULES,
        before=[strangers],
        timeout=GIVEN_UP,
    )
