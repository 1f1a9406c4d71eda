"""What a model card may say of an evaluation: scores beside the base's, and how they were taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.card.evaluation_curve import PARALLELISM
from dllm_convert.card.pictures import Picture

METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "exact_match": "exact_match"}
"""Metrics of lm-eval by the names the Hub has for them."""


@dataclass(frozen=True)
class Score:
    """One line of the table.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        items: Items it was measured on.
        shots: Examples before each, None if unknown.
        value: Mean of this model.
        after: The same with its 95 % interval, as text.
        before: That of the base, None if there is none.
        difference: The paired difference, None without a base.
    """

    task: str
    metric: str
    items: int
    shots: int | None
    value: float
    after: str
    before: str | None
    difference: str | None

    @property
    def hub_metric(self) -> str:
        """Name of the metric on the Hub."""
        return METRICS.get(self.metric, self.metric)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation.

    Attributes:
        scores: Lines of the table.
        sweep: Rows of the sweep over thresholds.
        parallelism: Accuracy under parallelism of each task and metric that was swept.
        effort: What it took.
        settings: How it was done.
        text: Names of the held-out text that was measured on; empty if none was.
        nelbo: Nats per token of this model on it, None if there is none.
        nll: The same of the base.
        picture: The curve, None if it is not in the folder.
    """

    scores: tuple[Score, ...]
    sweep: tuple[Mapping[str, Any], ...]
    parallelism: tuple[Mapping[str, Any], ...]
    effort: Mapping[str, Any]
    settings: Mapping[str, Any]
    text: str
    nelbo: float | None
    nll: float | None
    picture: Picture | None

    @property
    def compared(self) -> bool:
        """Whether the base was evaluated too."""
        return any(score.before for score in self.scores)


def evaluation_of(folder: Path, section: Mapping[str, Any] | None) -> Evaluation | None:
    """Read the `evaluation` section of a manifest.

    Args:
        folder: The checkpoint, for its picture.
        section: The section, None if there is none.
    """
    if not section:
        return None
    text = section.get("text") or {}
    return Evaluation(
        scores=tuple(
            _score(row, section.get("tasks") or {}) for row in section.get("results") or ()
        ),
        sweep=tuple(section.get("sweep") or ()),
        parallelism=tuple(section.get("parallelism") or ()),
        effort=(section.get("effort") or {}).get("after") or {},
        settings=section["settings"],
        text=str(text.get("source", "")),
        nelbo=_nats(text.get("nelbo")),
        nll=_nats(text.get("nll")),
        picture=PARALLELISM if (folder / PARALLELISM.file).is_file() else None,
    )


def _nats(measured: Mapping[str, Any] | None) -> float | None:
    nats = measured["nats_per_token"] if measured else None
    return None if nats is None else float(nats)


def _score(row: Mapping[str, Any], tasks: Mapping[str, Any]) -> Score:
    task = tasks.get(row["task"]) or {}
    shots = task.get("shots")
    return Score(
        task=str(row["task"]),
        metric=str(row["metric"]),
        items=int(row["after"]["items"]),
        shots=None if shots is None else int(shots),
        value=float(row["after"]["value"]),
        after=with_interval(row["after"]),
        before=with_interval(row["before"]) if row.get("before") else None,
        difference=with_interval(row["difference"], "+") if row.get("difference") else None,
    )


def with_interval(mean: Mapping[str, Any], sign: str = "") -> str:
    """Return a mean with its 95 % interval, if it has one.

    Args:
        mean: Fields `value` and `half_width`, None for none.
        sign: `+` for a difference.
    """
    width = mean["half_width"]
    return f"{mean['value']:{sign}.3f}" + ("" if width is None else f" ± {width:.3f}")
