"""A conversion in several processes that Python asked for, and what each of them runs."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dllm_convert import errors
from dllm_convert.common.console import Reporter
from dllm_convert.common.interruption import INTERRUPTED, Interruption
from dllm_convert.common.json_files import write_json
from dllm_convert.common.ranks import Rank, lost_process
from dllm_convert.errors import DllmConvertError
from dllm_convert.pipeline.launch import launch
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.schema import Recipe


def run_together(
    recipe: Recipe,
    out: Path,
    how: RunOptions,
    *,
    launched: Launch,
    quiet: bool = False,
) -> None:
    """Convert in several processes of this machine, and wait for them.

    Args:
        recipe: The resolved recipe.
        out: Folder in which the checkpoint appears when it is whole.
        how: As in `pipeline.run.run`.
        launched: Who they are and what they share.
        quiet: Whether the first of them tells warnings only.

    Raises:
        DllmConvertError: One of them failed, as it said itself; or they cannot be started.
        KeyboardInterrupt: They were told to end. The same call goes on.
    """
    with tempfile.TemporaryDirectory(prefix="dllm-convert-launch-") as name:
        job = Path(name) / "job.json"
        asked = {"link": how.link, "verify": how.verify, "extend": how.extend, "quiet": quiet}
        write_json(job, {"recipe": recipe.model_dump(mode="json"), "out": str(out), **asked})
        code = launch(launched, [str(job)], module=__name__)
        if code:
            raise _told(Path(name)) or (
                KeyboardInterrupt()
                if code == INTERRUPTED
                else DllmConvertError(
                    f"a process of the conversion ended with code {code}",
                    hint="What it wrote to stderr says why; the same call goes on where it stopped",
                )
            )


def _told(folder: Path) -> DllmConvertError | None:
    """Return the failure that the first of the processes left, None if none did."""
    for path in sorted(folder.glob("failure-*.json")):
        said = json.loads(path.read_text(encoding="utf-8"))
        kind: type[DllmConvertError] = getattr(errors, said["kind"], DllmConvertError)
        return kind(said["message"], hint=said["hint"])
    return None


def take_part(job: Path, place: Rank) -> None:
    """Do one process's share of a conversion: the first does it, the others train with it.

    Raises:
        DllmConvertError: A stage failed.
    """
    asked: dict[str, Any] = json.loads(job.read_text(encoding="utf-8"))
    recipe, out = Recipe.model_validate(asked["recipe"]), Path(asked["out"])
    if recipe.training.method != "none":
        from dllm_convert.common.allocator import keep_freed_memory

        keep_freed_memory()
    from dllm_convert.pipeline.run import follow, run

    if not place.main:
        follow(out, place)
        return
    how = RunOptions(link=asked["link"], verify=Depth(asked["verify"]), extend=asked["extend"])
    run(recipe, out, Reporter(quiet=asked["quiet"]), place=place, how=how)


def main(job: Path) -> int:
    """Take part, and leave word of a known failure for the process that started all.

    Returns:
        The exit code.
    """
    place = Rank.from_environment()
    try:
        with Interruption(gently=False):
            take_part(job, place)
    except KeyboardInterrupt:
        return INTERRUPTED
    except DllmConvertError as error:
        said = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        write_json(job.with_name(f"failure-{place.rank:06}.json"), said)
        return error.exit_code
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        # Whoever was lost, or its launcher, has said more.
        Reporter(quiet=True).warn(str(lost))
        return lost.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
