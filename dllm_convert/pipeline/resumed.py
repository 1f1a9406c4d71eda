"""A run that goes on: are the source and what was written still what they were?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dllm_convert.common.copying import sha256_files
from dllm_convert.common.manifest import MANIFEST_FILE, changed_files, read_manifest
from dllm_convert.errors import DataError
from dllm_convert.pipeline.workspace import Workspace
from dllm_convert.planning.conversion import ConversionPlan

if TYPE_CHECKING:
    from dllm_convert.source.materialise import Materialised

_LOADED = (".safetensors", ".json", ".py", ".jinja")


def check_resumed(
    workspace: Workspace, plan: ConversionPlan, source: Callable[[], Materialised], *, trains: bool
) -> None:
    """Compare hashes with those that an earlier session of the run recorded.

    A file of the untrained conversion or of the staged checkpoint that changed is made again.

    Args:
        workspace: The run; stages that have to be done again are forgotten.
        plan: The conversion.
        source: Returns the source, fetched if need be.
        trains: Whether the staged weights come out of a training.

    Raises:
        DataError: The source changed, or trained weights did; of a finished run, files are gone.
    """
    adapted = workspace.result("adapt")
    if adapted is None or "files" not in adapted:
        return
    if workspace.result("publish") is not None:
        _check_finished(workspace.out)
        return
    _check_source(adapted["source_files"], source(), plan)
    untrained = workspace.work / "untrained"
    stale = untrained.is_dir() and changed_files(untrained, adapted["files"])
    if stale and not (trains and workspace.result("assemble")):
        workspace.forget("adapt")
        if not trains:
            workspace.forget("assemble", "verify", "document")
    if workspace.result("assemble") is not None:
        _check_staged(workspace, trains=trains)


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
