"""The output folder while it is being made: journal, lock, and the final rename.

Work lives in `<out>/.work/` until the checkpoint is whole; then its files are renamed into `<out>`,
`config.json` last, because no loader reads a folder without it. A run killed between two renames
finishes them when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_convert.common.differences import differences
from dllm_convert.common.disk import reporting_full_disk, sync
from dllm_convert.common.foreign_files import MAX_VOCABULARY_BYTES, read_text
from dllm_convert.common.json_files import load_json_object, write_json
from dllm_convert.common.work_folder import LOCK, WORK, locked, work_folder
from dllm_convert.errors import DataError

LAST = "config.json"
JOURNAL = "journal.json"
_PROBE = ".writable"
_SOON_AGAIN = frozenset({"materialise", "adapt", "baseline"})
"""Stages that take minutes at most: a run that got no further holds its folder against nobody."""
_LASTING = ("written", "trainer", "metrics.jsonl", "trained", "staged")
"""What the stages after those leave in the work folder, whole or not."""
_BEGUN = {LOCK, _PROBE, f"{JOURNAL}.partial"}
"""What a run that was killed before its journal was there may have left."""


def fingerprint(recipe: Mapping[str, Any], source: Mapping[str, str]) -> str:
    """Identity of a run: what is asked for and the content it starts from."""
    text = json.dumps({"recipe": dict(recipe), "source": dict(source)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Workspace:
    """An output folder, locked for one run.

    Attributes:
        out: Where the finished checkpoint appears.
        stages: Name, seconds and result of every finished stage, in order.
        run: Fingerprint of the run.
        asked: What it was asked for, to say how another one differs.
        extends: Of a run that goes on with a finished checkpoint, what is remembered of that.
        pace: What the training's time limit came to, once that is known: fields of
            `training.pacing.Pace`.
    """

    out: Path
    stages: list[dict[str, Any]] = field(default_factory=list)
    run: str = ""
    asked: Mapping[str, Any] = field(default_factory=dict)
    extends: Mapping[str, Any] | None = None
    pace: Mapping[str, int] | None = None

    @property
    def finished(self) -> bool:
        """Whether the checkpoint stands in its folder."""
        return self.result("publish") is not None

    @property
    def hardly_begun(self) -> bool:
        """Whether all that was done is soon done again: nothing was trained or written."""
        names = {stage["name"] for stage in self.stages}
        left = any((self.work / name).exists() for name in _LASTING)
        return self.extends is None and names <= _SOON_AGAIN and not left

    @property
    def work(self) -> Path:
        """Folder of everything that is not published."""
        return self.out / WORK

    @property
    def journal(self) -> Path:
        """File that remembers finished stages."""
        return self.work / JOURNAL

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
        self.record()
        return result

    def record(self) -> None:
        """Write the journal."""
        content = {"run": self.run, "stages": self.stages, "asked": dict(self.asked)}
        if self.extends is not None:
            content["extends"] = dict(self.extends)
        if self.pace is not None:
            content["pace"] = dict(self.pace)
        write_json(self.journal, content)

    def forget(self, *names: str) -> None:
        """Have stages done again: what they left is not what they recorded."""
        self.stages[:] = [stage for stage in self.stages if stage["name"] not in names]
        self.record()

    def clear(self) -> None:
        """Remove what an earlier run left in the work folder, its journal and the lock aside."""
        for path in self.work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (JOURNAL, LOCK):
                path.unlink()

    def publish(self) -> dict[str, Any]:
        """Rename the staged files into place, `config.json` last; goes on after a kill."""
        if not self.staged.is_dir():
            return {}
        if (self.staged / LAST).is_file():
            self._make_way()
        for path in sorted(self.staged.iterdir(), key=lambda path: path.name == LAST):
            target = self.out / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            if path.name == LAST:
                sync(self.out)
            if target.is_file() and path.samefile(target):
                # One file by two names, as of a base that is kept: renamed, both would stay.
                path.unlink()
            else:
                path.replace(target)
        sync(self.out)
        self.staged.rmdir()
        return {}

    def _make_way(self) -> None:
        """Take away what an earlier checkpoint of this folder has and the staged one has not.

        Its config goes too: nobody loads a folder that is half the one and half the other.
        """
        manifest = self.out / "dllm_convert.json"
        if not ((self.out / LAST).is_file() and manifest.is_file()):
            return
        listed = load_json_object(manifest).get("files")
        kept, inside = {path.name for path in self.staged.iterdir()}, self.out.resolve()
        for name in listed if isinstance(listed, Mapping) else ():
            path = self.out / name
            # A manifest is a file that anybody may have written: nothing outside the folder goes.
            ours = ".." not in path.parts and path.parent.resolve().is_relative_to(inside)
            if ours and name.split("/")[0] not in kept and path.is_file():
                path.unlink()
        # The mark that all this is done: what was renamed since must not count as left over.
        (self.out / LAST).unlink()


def check_apart(out: Path, source: Path | None) -> None:
    """Check that neither of output folder and source lies in the other, whatever they are called.

    Files of the source would be replaced, or it would change by what is written into it. Beside a
    single file, such as a GGUF, there is room.

    Args:
        out: Output folder, which need not exist.
        source: Folder or file of the source; None if it is on the Hub.

    Raises:
        DataError: One lies in the other, or they are one folder.
    """
    if source is None or not source.exists():
        return
    folder = source if source.is_dir() else source.parent
    if out.exists() and out.samefile(folder):
        raise DataError(
            f"--out {out} is the source itself, which is only read", hint="Give another --out"
        )
    if source.is_dir() and _is_in(out, folder):
        beside = folder.resolve().parent / (out.resolve().name)
        raise DataError(
            f"--out {out} lies in the source {source}, which is only read",
            hint=f"Give a folder beside it, such as --out {beside}",
        )
    if _is_in(source, out):
        raise DataError(
            f"the source {source} lies in --out {out}, whose files are replaced",
            hint="Give another --out",
        )


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path that need not exist is a folder or lies below it, links followed."""
    resolved = path.resolve()
    above = (place for place in (resolved, *resolved.parents) if place.exists())
    return folder.exists() and any(place.samefile(folder) for place in above)


def _is_ours(out: Path) -> bool:
    """Whether a folder carries our journal, or was only begun: a name alone says nothing."""
    if (out / WORK / JOURNAL).exists():
        return True
    begun = {path.name for path in (out / WORK).iterdir()} if (out / WORK).is_dir() else set()
    return {path.name for path in out.iterdir()} <= {WORK} and begun <= _BEGUN


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file, expected a folder", hint="Give another --out")
    if out.is_dir() and not _is_ours(out):
        raise DataError(
            f"--out {out} is not empty and was not made by dllm-convert",
            hint="Give a new folder with --out",
        )
    try:
        probe = work_folder(out) / _PROBE
        probe.unlink(missing_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"--out {out} cannot be written ({error.strerror})", hint="Give another --out"
        ) from error


def _sequences(asked: Mapping[str, Any]) -> int:
    """Sequences per step over all processes, of what a run was asked for; 0 if that is not told."""
    training = asked.get("training")
    return int(training.get("sequences_per_step", 0)) if isinstance(training, Mapping) else 0


@contextmanager
def open_workspace(
    out: Path,
    run: str,
    asked: Mapping[str, Any] | None = None,
    *,
    extend: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Iterator[Workspace]:
    """Lock `out` for one run and read how far an earlier one got.

    One of another recipe that got no further than what is soon done again makes way.

    Args:
        out: Output folder; created if it does not exist.
        run: Fingerprint of the run.
        asked: Fields that the fingerprint was taken of.
        extend: Goes on with a finished checkpoint, and returns what is remembered of it.

    Raises:
        DataError: If `out` is a file, foreign, not writable, in use, or holds another run.
    """
    _check_folder(out)
    workspace = Workspace(out, run=run, asked=asked or {})
    with locked(out):
        if workspace.journal.exists():
            found = read_workspace(out)
            given_up = found.extends is not None and found.run != run and (out / LAST).is_file()
            # A name of a text that was mistyped, or a batch too large: the folder is free.
            is_free = found.run != run and extend is None and found.hardly_begun
            if is_free or (extend is not None and (found.finished or given_up)):
                workspace.extends = None if extend is None else extend(out)
                workspace.clear()
                workspace.record()
                yield workspace
                return
            workspace = found
            if workspace.run != run:
                again = "Repeat the command it was started with, or give another --out"
                if workspace.finished:
                    again += "; --extend trains a finished checkpoint on"
                what = differences(workspace.asked, asked or {})
                before = _sequences(workspace.asked)
                if before and before != _sequences(asked or {}):
                    again += f"; --global-batch {before} has other processes share a step alike"
                if not what and workspace.extends is not None:
                    what = ": it was trained on since, with --extend"
                raise DataError(
                    f"{out} holds a run with a different recipe or source{what}",
                    hint=again,
                )
        else:
            if extend is not None:
                raise DataError(
                    f"--extend goes on with a finished checkpoint, and {out} holds none",
                    hint="Leave --extend out, or give the --out of a finished run",
                )
            workspace.record()
        yield workspace


def goes_on(out: Path, run: str, *, extend: bool = False) -> bool:
    """Whether an output folder holds this run already, finished or not.

    Args:
        out: The folder.
        run: Fingerprint of the run.
        extend: Whether it trains a finished checkpoint on, as often as it is asked for.

    Raises:
        DataError: The journal is not one of ours, or damaged.
    """
    if not (out / WORK / JOURNAL).exists():
        return False
    found = read_workspace(out)
    return found.run == run and not (extend and found.finished)


def read_workspace(out: Path) -> Workspace:
    """Read how far a run has got: an earlier one, or that of another process.

    Raises:
        DataError: The journal is not one of ours, or damaged.
    """
    path = Workspace(out).journal
    try:
        journal = json.loads(read_text(path, MAX_VOCABULARY_BYTES))
        stages = [
            {"name": str(s["name"]), "seconds": s["seconds"], "result": {**s["result"]}}
            for s in journal["stages"]
        ]
        extends, pace = journal.get("extends"), journal.get("pace")
        return Workspace(
            out,
            stages,
            str(journal["run"]),
            {**(journal.get("asked") or {})},
            None if extends is None else {**extends, "history": [*extends["history"]]},
            None if pace is None else {name: int(pace[name]) for name in ("at", "steps")},
        )
    except (DataError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged, so it is not known how far this run got",
            hint="Give another --out to start anew, or put the journal back from a copy",
        ) from error
