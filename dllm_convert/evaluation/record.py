"""An evaluation, and where it is written down: the checkpoint's manifest."""

from __future__ import annotations

from typing import Any

from dllm_convert.console import Reporter
from dllm_convert.errors import DllmConvertError
from dllm_convert.evaluation.run import Request, evaluate_tasks
from dllm_convert.manifest import MANIFEST_FILE, read_manifest, write_manifest


def evaluate_checkpoint(request: Request, reporter: Reporter) -> dict[str, Any]:
    """Evaluate a checkpoint and add the result to its dllm_convert.json.

    Of several processes the first one writes.

    Args:
        request: What is to be evaluated.
        reporter: Progress.

    Returns:
        The `evaluation` section; empty on other processes than the first.

    Raises:
        DllmConvertError: There is nothing to evaluate, or lm-eval is not installed.
    """
    if not request.tasks:
        raise DllmConvertError(
            "no tasks to evaluate", hint="Name some, as in --tasks dllm_copy,dllm_cloze"
        )
    found = evaluate_tasks(request, reporter)
    path = request.checkpoint / MANIFEST_FILE
    if found and path.is_file():
        write_manifest(
            request.checkpoint, {**read_manifest(request.checkpoint), "evaluation": found}
        )
    return found
