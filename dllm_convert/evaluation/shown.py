"""An evaluation for people, from the section of the manifest that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dllm_convert.common.tables import Printed, measure_cells, table


@dataclass(frozen=True)
class Evaluation(Printed):
    """What an evaluation found.

    Attributes:
        record: The `evaluation` section of the checkpoint's manifest.
    """

    record: Mapping[str, Any]

    @property
    def results(self) -> tuple[Mapping[str, Any], ...]:
        """A row per task and metric: `task`, `metric`, `after`; with a base, `before` too."""
        return tuple(self.record.get("results") or ())

    @property
    def text(self) -> Mapping[str, Any]:
        """Likelihood of held-out text: `nelbo`, and `nll` of the base; empty if not asked for."""
        return dict(self.record.get("text") or {})

    def as_dict(self) -> dict[str, Any]:
        """Return the section as it is recorded."""
        return dict(self.record)

    def as_text(self) -> str:
        """Return the tables."""
        return evaluation_text(self.record)


def evaluation_text(evaluation: Mapping[str, Any]) -> str:
    """Return the tables of an evaluation: both models on the same items, and the sweep.

    Args:
        evaluation: The `evaluation` section of the manifest.
    """
    parts = []
    if evaluation.get("results"):
        parts += _task_tables(evaluation)
    text = evaluation.get("text")
    if text:
        labels = {"nelbo": "NELBO of the conversion", "nll": "NLL of the base"}
        rows = [(label, *measure_cells(text[key])) for key, label in labels.items() if key in text]
        parts.append(table((text["source"], "nats per token", "perplexity", "tokens"), rows))
    return "\n\n".join(parts)


def _task_tables(evaluation: Mapping[str, Any]) -> list[str]:
    header = ("task", "metric", "base", "conversion", "difference")
    rows = [
        (
            row["task"],
            row["metric"],
            _interval(row.get("before")),
            _interval(row["after"]),
            _interval(row.get("difference"), sign="+"),
        )
        for row in evaluation["results"]
    ]
    parts = [table(header, rows)]
    if evaluation.get("sweep"):
        columns = ("threshold", "task", "metric", "tokens_per_forward", "tokens_per_second")
        sweep = [
            (*(row[name] for name in columns[:3]), _interval(row), *(row[n] for n in columns[3:]))
            for row in evaluation["sweep"]
        ]
        names = ("threshold", "task", "metric", "score", "tokens per forward", "tokens/s")
        parts.append(table(names, sweep))
    parts += _effort_lines(evaluation["effort"])
    return parts


def _effort_lines(effort: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, name in (("before", "base"), ("after", "conversion")):
        took = effort.get(key) or {}
        if took.get("new_tokens"):
            lines.append(
                f"{name}: {took['new_tokens']:,} tokens written, {took['tokens_per_forward']} per "
                f"forward, {took['tokens_per_second']} per second"
            )
        if took.get("draws_saved"):
            lines.append(f"{name}: {took['draws_saved']:.0%} of the draws saved by stopping early")
    return ["\n".join(lines)] if lines else []


def _interval(mean: Mapping[str, Any] | None, *, sign: str = "") -> str:
    if mean is None:
        return "-"
    width = mean["half_width"]
    return f"{mean['value']:{sign}.3f}" + ("" if width is None else f" ± {width:.3f}")
