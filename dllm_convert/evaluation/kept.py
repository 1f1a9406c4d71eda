"""What an evaluation found before it was stopped, kept beside the checkpoint until all is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dllm_convert.common import strict_json
from dllm_convert.common.json_files import write_json
from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest
from dllm_convert.common.redaction import last_part
from dllm_convert.evaluation.outcome import Outcome
from dllm_convert.evaluation.request import Request

FOLDER = Path(".work/evaluation")
"""Of the folder where the result is recorded; a push publishes nothing of it."""
_MODEL = (".safetensors", ".json", ".py", ".jinja", ".npy")
"""Files that an answer depends on; card, report and pictures are written anew on the way."""


@dataclass(frozen=True)
class KeptOutcomes:
    """Outcomes of single tasks, each under what it depends on.

    Attributes:
        request: What is evaluated.
    """

    request: Request

    def get(self, model: str, task: str, find: Callable[[], Outcome]) -> Outcome:
        """Return what was found before, or find and keep it.

        Args:
            model: Which one: the conversion, perhaps at a threshold, or the base.
            task: Name of the task.
            find: Runs it.
        """
        path = self._folder / f"{self._key(model, task)}.json"
        known = _read(path)
        if known is not None:
            return known
        found = find()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(path, found.as_dict())
        return found

    def drop(self) -> None:
        """Forget all: the evaluation is recorded, and the next one begins anew."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self.request.home / FOLDER

    @cached_property
    def _files(self) -> Mapping[str, Any]:
        """What single outcomes depend on in files, which are looked at once."""
        request = self.request
        return {
            "weights": _weights(request.checkpoint),
            "include": [_content(Path(folder)) for folder in request.include],
        }

    def _key(self, model: str, task: str) -> str:
        request = self.request
        depends = {
            **self._files,
            "model": model,
            "base": request.base if model == "base" else None,
            "verifier": None if request.verifier is None else request.verifier.given,
            "task": task,
            "limit": request.limit,
            "chat": request.chat,
            "shots": request.shots_of(task),
            "settings": {**vars(request.settings), "generation": dict(request.settings.generation)},
        }
        text = strict_json.dumps(depends, sort_keys=True, default=str)
        return blake2b(text.encode(), digest_size=12).hexdigest()


def _read(path: Path) -> Outcome | None:
    """Read what was kept; None if nothing was, or half of it."""
    try:
        return Outcome.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def state_name(folder: Path) -> str:
    """Name a checkpoint of this machine and its state, without where it lies."""
    state = strict_json.dumps(_weights(folder), sort_keys=True)
    digest = blake2b(state.encode(), digest_size=6).hexdigest()
    return f"{last_part(str(folder.resolve()))}@{digest}"


def _weights(folder: Path) -> Mapping[str, Any]:
    """Return what tells one state of a checkpoint from another."""
    if (folder / MANIFEST_FILE).is_file():
        files = read_manifest(folder).get("files") or {}
        found = {name: digest for name, digest in files.items() if Path(name).suffix in _MODEL}
        if found:
            return found
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))}


def _content(folder: Path) -> str:
    """Return a hash of a folder of tasks."""
    found = blake2b(digest_size=12)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".yaml", ".py", ".json", ".jsonl"):
            found.update(path.read_bytes())
    return found.hexdigest()
