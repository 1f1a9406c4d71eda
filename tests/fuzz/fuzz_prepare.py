"""What the mutations damage: sources, their conversions, text and tasks; and the forking."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import forks
from factory import make_source, prose
from fuzz_program import FAMILIES
from hub_server import LoopbackHub
from pushing import TOKEN, checkpoint

MODULES = (*forks.PACKAGE, "lm_eval:simple_evaluate", "yaml", "typer.testing", "pyarrow.parquet")
PROGRAM = Path(__file__).with_name("fuzz_program.py")


def prepare(root: Path) -> None:
    """Write for each family a source and its conversion, and what they are evaluated on."""
    from tasks_on_disk import write_tasks

    for family, target in FAMILIES.items():
        make_source(root / family, family)
        checkpoint(root / family, root / f"{family}-out", target)
    (root / "text.txt").write_text("\n\n".join(prose(60)))
    (root / "tasks").mkdir()
    write_tasks(root / "tasks")


def fuzz(
    hub: LoopbackHub, prepared: Path, kind: str, first: int, count: int, log: Path
) -> subprocess.CompletedProcess[str]:
    """Feed mutations to the commands in a process of their own."""
    home = log.with_name("home")
    hub.add_user("me", TOKEN)
    line = [sys.executable, str(PROGRAM), str(prepared), kind, str(first), str(count), str(log)]
    environment = hub.environment(home, TOKEN) | {"OMP_NUM_THREADS": "1"}
    return forks.run(line, env=environment, modules=MODULES, timeout=900)
