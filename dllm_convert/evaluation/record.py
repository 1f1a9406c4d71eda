"""An evaluation, and where it is written down: the manifest, or a folder of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dllm_convert.card.evaluation_curve import PARALLELISM, draw_parallelism
from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.hub_names import is_model_id
from dllm_convert.common.json_files import load_json_object, write_json
from dllm_convert.common.manifest import (
    MANIFEST_FILE,
    REPORT_FILE,
    read_manifest,
    refuse_other_version,
    write_manifest,
)
from dllm_convert.common.ranks import Rank
from dllm_convert.common.redaction import last_part
from dllm_convert.errors import DataError, DllmConvertError, IncompatibleError, RequestError
from dllm_convert.evaluation.kept import state_name
from dllm_convert.evaluation.parallelism import parallelism
from dllm_convert.evaluation.request import Request

EVALUATION_VERSION = 1
"""Version of the `evaluation` section of the manifest."""
RECORD_FILE = "evaluation.json"
"""The same section of a checkpoint whose folder is not to be written in, as one of the Hub's."""


def evaluate_checkpoint(request: Request, reporter: Reporter) -> dict[str, Any]:
    """Evaluate a checkpoint and record the result, in its folder if the request names no other.

    Args:
        request: What is to be evaluated.
        reporter: Progress.

    Returns:
        The `evaluation` section.

    Raises:
        DllmConvertError: lm-eval is not installed.
        IncompatibleError: Several processes were started.
        RequestError: There is nothing to evaluate.
    """
    if not request.tasks and request.data is None:
        raise RequestError(
            "nothing to evaluate",
            hint="Name `tasks`, as in dllm_copy,dllm_last_word, or text with `data`, as in pydoc",
        )
    if Rank.from_environment().world > 1:
        raise IncompatibleError(
            "evaluate runs in one process",
            hint="accelerate launch -m dllm_convert lm-eval takes several",
        )
    # Its result is written into the manifest: what cannot be is told before hours of work.
    refuse_other_version(request.checkpoint)
    _check_record(request)
    started = time.monotonic()
    settings: dict[str, Any] = {
        "format_version": EVALUATION_VERSION,
        "settings": _settings(request),
    }
    earlier = _earlier(request, settings, reporter)

    def record(sections: dict[str, Any]) -> dict[str, Any]:
        seconds = round(time.monotonic() - started + earlier.get("seconds", 0.0), 1)
        found = settings | _merged(earlier, sections) | {"seconds": seconds}
        if request.record is None:
            record_evaluation(request.checkpoint, found)
        else:
            draw_parallelism(found.get("sweep") or (), request.record)
            write_json(request.record / RECORD_FILE, found)
        return found

    sections: dict[str, Any] = {}
    if request.tasks:
        from dllm_convert.evaluation.run import evaluate_tasks

        sections = evaluate_tasks(request, reporter, record)
    if request.data is not None:
        from dllm_convert.evaluation.text import measure_text

        sections["text"] = measure_text(request, reporter)
    found = record(sections)
    if failed := sections.get("failed"):
        names = ", ".join(failed)
        raise DllmConvertError(
            f"{len(failed)} of {len(request.tasks)} tasks failed: {names}; the others are recorded",
            hint="The same command does what failed, and only that, again",
        )
    return found


def _check_record(request: Request) -> None:
    """Refuse a folder for the result that is something else.

    Raises:
        DataError: It is a file, or a checkpoint, which keeps its evaluation in its manifest.
    """
    folder = request.record
    if folder is None:
        return
    taken = "a file" if folder.is_file() else "a checkpoint"
    if folder.is_file() or (folder / "config.json").is_file():
        raise DataError(
            f"{folder} is {taken}, expected a folder for what is found", hint="Give another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--out {folder} cannot be written ({error.strerror})", hint="Give another --out"
        ) from error


def _earlier(request: Request, settings: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Return what an evaluation with the same settings recorded; of other settings nothing.

    In a folder of its own it may be another model's, which is told before it is replaced.
    """
    kept = request.home / (MANIFEST_FILE if request.record is None else RECORD_FILE)
    if not kept.exists():
        return {}
    if request.record is None:
        found: dict[str, Any] = read_manifest(request.checkpoint).get("evaluation") or {}
    else:
        found = dict(load_json_object(kept))
        one, this = (_checkpoint(section) for section in (found, settings))
        if one != this:
            reporter.warn(
                f"{kept} holds what was found of {one or 'a checkpoint that it does not name'}; "
                f"what is found of {this} takes its place: another --out keeps both"
            )
    same = all(found.get(name) == value for name, value in settings.items())
    return found if same else {}


def _checkpoint(section: dict[str, Any]) -> str | None:
    settings = section.get("settings")
    name = settings.get("checkpoint") if isinstance(settings, dict) else None
    return None if name is None else str(name)


def _merged(earlier: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Put what was found over what the same settings found before, task by task."""
    failed = sections.get("failed", {})
    again = {*sections.get("tasks", ()), *failed}
    rows = {
        name: [row for row in earlier.get(name) or () if row["task"] not in again]
        + list(sections.get(name) or ())
        for name in ("results", "sweep")
    }
    rows["parallelism"] = parallelism(rows["sweep"], rows["results"])
    tasks = {**earlier.get("tasks", {}), **sections.get("tasks", {})}
    merged = {
        **rows,
        "tasks": {name: facts for name, facts in tasks.items() if name not in failed},
        "effort": sections.get("effort") or earlier.get("effort"),
        "text": sections.get("text") or earlier.get("text"),
        "failed": failed,
    }
    return {name: value for name, value in merged.items() if value}


def _settings(request: Request) -> dict[str, Any]:
    settings = {**vars(request.settings), "generation": dict(request.settings.generation)}
    name, verifier = request.name, request.verifier
    if name is None and request.record is not None:
        name = state_name(request.checkpoint)  # that folder may hold what another model does
    return {
        **({} if name is None else {"checkpoint": name}),
        "base": None if request.base is None else _public_name(request.base),
        **({} if verifier is None else {"verifier": _public_name(verifier.given)}),
        "limit": request.limit,
        "batch_size": request.batch_size,
        "chat": request.chat,
        "shots": request.shots,
        "published": request.published,
        **settings,
    }


def _public_name(base: str) -> str:
    """Name a base without the path of this machine, for the manifest is published."""
    return base if is_model_id(base) and not Path(base).exists() else last_part(base)


def record_evaluation(folder: Path, found: dict[str, Any]) -> None:
    """Draw an evaluation's picture, add it to the manifest and to a report that is there.

    Args:
        folder: The checkpoint; without a manifest, the picture is all that is written.
        found: The `evaluation` section.
    """
    from dllm_convert.card.report import write_report

    drawn = draw_parallelism(found.get("sweep") or (), folder)
    if not (folder / MANIFEST_FILE).exists():
        return
    manifest = read_manifest(folder)
    files = {
        name: digest
        for name, digest in (manifest.get("files") or {}).items()
        if name != PARALLELISM.file
    }
    if drawn:
        files[PARALLELISM.file] = sha256_file(folder / PARALLELISM.file)
    write_manifest(folder, {**manifest, "files": files, "evaluation": found})
    if (folder / REPORT_FILE).is_file():
        write_report(folder)
