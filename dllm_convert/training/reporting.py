"""Where else a training logs to: the Trainer's integrations, kept on this machine by default."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from dllm_convert.errors import DllmConvertError

DISTRIBUTIONS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""Integration to the packages of which it needs one."""


def require_installed(integrations: Iterable[str]) -> None:
    """Refuse an integration whose package is missing, before hours are spent without it.

    Raises:
        DllmConvertError: One is missing.
    """
    for name in integrations:
        if not any(is_installed(distribution) for distribution in DISTRIBUTIONS[name]):
            raise DllmConvertError(
                f"--report-to {name} needs the package {name}, which is not installed",
                hint=f"pip install {name}, or leave it out: .work/metrics.jsonl is always written",
            )


def is_installed(distribution: str) -> bool:
    """Whether a package is installed, by the name it is installed under."""
    # Not by import: a run of wandb leaves a folder `wandb` that Python would take for the package.
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def report_arguments(integrations: Iterable[str], run_name: str) -> dict[str, Any]:
    """Return the TrainingArguments of the integrations."""
    names = list(dict.fromkeys(integrations))
    arguments: dict[str, Any] = {"report_to": names}
    if names:
        # transformers 5.2 would make trackio create a Space on the Hub unasked.
        arguments |= {"run_name": run_name, "trackio_space_id": None}
    return arguments


def keep_in(trainer: Any, folder: Path) -> None:
    """Have TensorBoard's files beside metrics.jsonl, not in a folder that goes with checkpoints."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")
