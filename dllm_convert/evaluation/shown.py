"""An evaluation for people, from the section of the manifest that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_convert.card.evaluation import with_interval
from dllm_convert.common.tables import Block, Printed, Table, apart, measure_cells


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

    def as_blocks(self) -> list[Block]:
        """Return the tables: both models on the same items, and the sweep."""
        blocks: list[Block] = []
        if self.results:
            blocks += _task_blocks(self.record)
        if self.text:
            labels = {"nelbo": "NELBO of the conversion", "nll": "NLL of the base"}
            rows = [
                (label, *measure_cells(self.text[key]))
                for key, label in labels.items()
                if key in self.text
            ]
            header = (self.text["source"], "nats per token", "perplexity", "tokens")
            blocks.append(Table(header, rows))
        if blocks and (self.record.get("settings") or {}).get("base", "") is None:
            blocks.append("no base beside it: --against BASE evaluates one on the same items")
        return apart(blocks)


def _task_blocks(evaluation: Mapping[str, Any]) -> list[Block]:
    header = ("task", "metric", "base", "conversion", "difference")
    rows = [
        (
            row["task"],
            row["metric"],
            with_interval(row["before"]) if row.get("before") else "-",
            with_interval(row["after"]),
            with_interval(row["difference"], "+") if row.get("difference") else "-",
        )
        for row in evaluation["results"]
    ]
    parts: list[Block] = [Table(header, rows)]
    if evaluation.get("sweep"):
        parts.append(_sweep_table(evaluation["sweep"]))
    for row in evaluation.get("parallelism") or ():
        count = len(row["thresholds"])
        parts.append(
            f"{row['task']} {row['metric']}: accuracy under parallelism {row['aup']:.4g}, from "
            f"{count} threshold{'s' if count > 1 else ''}; autoregressive decoding with the best "
            f"score that is known here would have {row['best']:.4g}"
        )
    parts += _effort_lines(evaluation["effort"])
    verifier = evaluation["settings"]["generation"].get("verify_with")
    if verifier:
        whose = "the base's" if verifier == "base" else "that of autoregressive decoding"
        parts.append(
            f"lossless: what was written is {whose}, token for token, and so are score and "
            "likelihood"
        )
    return parts


def _sweep_table(sweep: Sequence[Mapping[str, Any]]) -> Table:
    columns = {"threshold": "threshold", "batch_size": "batch", "task": "task", "metric": "metric"}
    took = {
        "tokens_per_forward": "tokens per forward",
        "tokens_per_second": "tokens/s",
        "writing_seconds": "seconds",
    }
    if not any("batch_size" in row for row in sweep):
        del columns["batch_size"]
    rows = [
        (
            *(row.get(name, "-") for name in columns),
            with_interval(row),
            *(row.get(name, "-") for name in took),
        )
        for row in sweep
    ]
    return Table((*columns.values(), "score", *took.values()), rows)


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
