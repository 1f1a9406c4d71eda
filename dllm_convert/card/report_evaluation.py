"""What the report says of an evaluation: both models on the same items, and the curve."""

from __future__ import annotations

from collections.abc import Iterator

from dllm_convert.card.charts import score_figure
from dllm_convert.card.evaluation import Evaluation, with_interval
from dllm_convert.card.evaluation_curve import PARALLELISM, drawable
from dllm_convert.card.pictures import as_svg
from dllm_convert.card.tables import Table
from dllm_convert.card.text import figures


def scores_table(evaluation: Evaluation) -> Table | None:
    """A line per task and metric: the base, this model and their paired difference."""
    if not evaluation.scores:
        return None
    compared = evaluation.compared
    names = ("base", "this model", "difference") if compared else ("this model",)
    rows = []
    for score in evaluation.scores:
        found = (score.before or "not measured", score.after, score.difference or "")
        shots = "unknown" if score.shots is None else str(score.shots)
        values = found if compared else (score.after,)
        rows.append((score.task, score.metric, f"{score.items:,}", shots, *values))
    return Table(("task", "metric", "items", "examples before each", *names), tuple(rows))


def sweep_table(evaluation: Evaluation) -> Table | None:
    """Score and tokens per forward at each confidence threshold."""
    if not evaluation.sweep:
        return None
    header = ("confidence threshold", "task", "metric", "score")
    rows = tuple(
        (
            f"{row['threshold']:g}",
            str(row["task"]),
            str(row["metric"]),
            with_interval(row),
            *(_known(row.get(key)) for key in ("tokens_per_forward", "tokens_per_second")),
        )
        for row in evaluation.sweep
    )
    return Table((*header, "tokens per forward", "tokens per second"), rows)


def sweep_svg(evaluation: Evaluation) -> str | None:
    """Draw the scores over the tokens per forward; None where no thresholds were swept."""
    figure = score_figure(drawable(evaluation.sweep))
    return None if figure is None else as_svg(figure, PARALLELISM)


def notes(evaluation: Evaluation) -> Iterator[str]:
    """Say in sentences how it was measured and what it took."""
    if evaluation.scores:
        paired = "; the difference is paired, item by item" if evaluation.compared else ""
        yield f"± is the 95 % interval over items{paired}."
        draws = evaluation.settings["draws"] * evaluation.settings["rounds"]
        base = ", the base by its own likelihood" if evaluation.compared else ""
        yield (
            f"Choices are ranked by an estimated bound of their likelihood, up to {draws} draws, "
            f"the same noise for all choices of a question{base}."
        )
    if evaluation.effort.get("tokens_per_forward"):
        yield (
            f"Text was written with {_known(evaluation.effort['tokens_per_forward'])} tokens per "
            f"forward, {_known(evaluation.effort.get('tokens_per_second'))} tokens per second."
        )
    if evaluation.nelbo is not None:
        base = "" if evaluation.nll is None else f", NLL of the base {figures(evaluation.nll)}"
        yield (
            f"Held-out text ({evaluation.text}): NELBO {figures(evaluation.nelbo)} nats per "
            f"token{base}."
        )


def _known(value: float | None) -> str:
    return "none" if value is None else figures(value, 3)
