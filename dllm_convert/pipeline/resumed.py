"""A run that goes on: are the source and what was written still what they were?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dllm_convert.common.copying import sha256_files
from dllm_convert.common.manifest import MANIFEST_FILE, changed_files, read_manifest
from dllm_convert.errors import DataError
from dllm_convert.pipeline.context import Run
from dllm_convert.pipeline.stages import ADAPT, ASSEMBLE
from dllm_convert.pipeline.workspace import Workspace
from dllm_convert.planning.conversion import ConversionPlan

if TYPE_CHECKING:
    from dllm_convert.source.materialise import Materialised

_LOADED = (".safetensors", ".json", ".py", ".jinja")


def check_resumed(run: Run) -> None:
    """Compare hashes with those that an earlier session of the run recorded.

    A file of the untrained conversion or of the staged checkpoint that changed is made again.

    Args:
        run: The run; stages that have to be done again are forgotten.

    Raises:
        DataError: The source changed, or trained weights did; of a finished run, files are gone.
    """
    workspace, adapted = run.workspace, run.found(ADAPT)
    if adapted is None or not adapted.files:
        return
    if workspace.finished:
        _check_finished(workspace.out)
        return
    _check_source(adapted.source_files, run.source, run.plan)
    stale = run.untrained.is_dir() and changed_files(run.untrained, adapted.files)
    assembled = run.found(ASSEMBLE) is not None
    if stale and not (run.trains and assembled):
        workspace.forget("adapt")
        if not run.trains:
            workspace.forget("assemble", "verify", "document")
    if run.found(ASSEMBLE) is not None:
        _check_staged(workspace, trains=run.trains)


def _check_finished(out: Path) -> None:
    """Check that what is loaded is still there; pictures and pages a person may take away."""
    listed: Any = read_manifest(out).get("files") or {}
    loaded = [name for name in listed if PurePosixPath(name).suffix in _LOADED and "/" not in name]
    gone = sorted(name for name in loaded if not (out / name).is_file())
    if gone:
        raise DataError(
            f"the run in {out} is finished, and {', '.join(gone[:3])} is no longer there",
            hint="Put it back from a copy, or convert again with another --out",
        )


def _check_source(recorded: Mapping[str, str], source: Materialised, plan: ConversionPlan) -> None:
    found: Mapping[str, str] = source.originals or sha256_files(
        {name: path for name in recorded if (path := source.folder / name).is_file()}
    )
    changed = sorted(name for name in recorded if found.get(name) != recorded[name])
    if changed:
        raise DataError(
            f"{plan.source.given}: {', '.join(changed[:3])} changed since this run began",
            hint="Put the old files back, or convert the new ones with another --out",
        )


def _check_staged(workspace: Workspace, *, trains: bool) -> None:
    """Check what stands ready to be renamed; a kill among the renames leaves it in two places."""
    out, staged = workspace.out, workspace.staged
    if not (staged / MANIFEST_FILE).is_file():
        return
    recorded: Any = read_manifest(staged).get("files") or {}
    waiting = {name: digest for name, digest in recorded.items() if not _in_place(out, name)}
    changed = changed_files(staged, waiting)
    if not changed:
        return
    weights = [name for name in changed if name.endswith(".safetensors")]
    if trains and weights:
        raise DataError(
            f"{staged / weights[0]} {changed[weights[0]]}: trained weights cannot be made again "
            "without the training",
            hint="Give another --out to train again",
        )
    workspace.forget("assemble", "verify", "document")


def _in_place(out: Path, name: str) -> bool:
    return (out / name).is_file()
