"""The output folder while it is being made: journal, lock, and the final rename.

Work lives in `<out>/.work/` until the checkpoint is whole; then its files are renamed into `<out>`,
`config.json` last, because no loader reads a folder without it. A run killed between two renames
finishes them when it is started again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_convert.disk import reporting_full_disk, sync, write_whole
from dllm_convert.errors import DataError

WORK = ".work"
LAST = "config.json"


def fingerprint(recipe: Mapping[str, Any], source: Mapping[str, str]) -> str:
    """Identity of a run: what is asked for and the content it starts from."""
    text = json.dumps({"recipe": dict(recipe), "source": dict(source)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a kill or a power cut leaves the old file or the new one, whole."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


@dataclass
class Workspace:
    """An output folder, locked for one run.

    Attributes:
        out: Where the finished checkpoint appears.
        stages: Name, seconds and result of every finished stage, in order.
    """

    out: Path
    stages: list[dict[str, Any]] = field(default_factory=list)
    run: str = ""

    @property
    def work(self) -> Path:
        """Folder of everything that is not published."""
        return self.out / WORK

    @property
    def journal(self) -> Path:
        """File that remembers finished stages."""
        return self.work / "journal.json"

    @property
    def staged(self) -> Path:
        """Folder where the checkpoint is put together before it appears."""
        return self.work / "staged"

    def result(self, name: str) -> dict[str, Any] | None:
        """Return what a finished stage recorded, or None."""
        return next((stage["result"] for stage in self.stages if stage["name"] == name), None)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage once; a later run of the same command gets the recorded result."""
        done = self.result(name)
        if done is not None:
            return done
        started = time.monotonic()
        with reporting_full_disk(self.out):
            result = work()
        self.stages.append(
            {"name": name, "seconds": round(time.monotonic() - started, 3), "result": result}
        )
        write_json(self.journal, {"run": self.run, "stages": self.stages})
        return result

    def forget(self, *names: str) -> None:
        """Have stages done again: what they left is not what they recorded."""
        self.stages[:] = [stage for stage in self.stages if stage["name"] not in names]
        write_json(self.journal, {"run": self.run, "stages": self.stages})

    def publish(self) -> dict[str, Any]:
        """Rename the staged files into place, `config.json` last; goes on after a kill."""
        if not self.staged.is_dir():
            return {}
        for path in sorted(self.staged.iterdir(), key=lambda path: path.name == LAST):
            target = self.out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            if path.name == LAST:
                sync(self.out)
            path.replace(target)
        sync(self.out)
        self.staged.rmdir()
        return {}


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file, expected a folder", hint="Give another --out")
    foreign = out.is_dir() and not (out / WORK).is_dir() and any(out.iterdir())
    if foreign:
        raise DataError(
            f"--out {out} is not empty and was not made by dllm-convert",
            hint="Give a new folder with --out",
        )
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        probe = out / WORK / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"--out {out} cannot be written ({error.strerror})", hint="Give another --out"
        ) from error


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder; its work folder is made if there is none.

    Raises:
        DataError: If another process holds it.
    """
    work = out / WORK
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another run is writing to {out}", hint="Wait for it, or give another --out"
            ) from error
        yield


@contextmanager
def open_workspace(out: Path, run: str) -> Iterator[Workspace]:
    """Lock `out` for one run and read how far an earlier one got.

    Args:
        out: Output folder; created if it does not exist.
        run: Fingerprint of the run.

    Raises:
        DataError: If `out` is a file, foreign, not writable, in use, or holds another run.
    """
    _check_folder(out)
    workspace = Workspace(out, run=run)
    with locked(out):
        if workspace.journal.exists():
            workspace = read_workspace(out)
            if workspace.run != run:
                raise DataError(
                    f"{out} holds a run with a different recipe or source",
                    hint="Repeat the command it was started with, or give another --out",
                )
        else:
            write_json(workspace.journal, {"run": run, "stages": []})
        yield workspace


def read_workspace(out: Path) -> Workspace:
    """Read how far a run has got: an earlier one, or that of another process."""
    journal = json.loads(Workspace(out).journal.read_text(encoding="utf-8"))
    return Workspace(out, journal["stages"], journal["run"])
