"""What was measured as tables of plain values: for the card, the report and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from dllm_convert.card.evaluation import Evaluation, with_interval
from dllm_convert.card.text import figures
from dllm_convert.common.tables import Block, Table
from dllm_convert.verification.observe.observations import InfluenceMap, Observations, RatePoint

MEASURES = {
    "nelbo_before": "NELBO before training",
    "nelbo_after": "NELBO after training",
    "ar_nll": "NLL of the base, autoregressive",
}
"""Likelihoods of held-out text, by their keys in a manifest's `measurements`."""
SKETCH = 16
"""Most rows of an influence map on a terminal."""


@dataclass(frozen=True)
class Measure:
    """One line of the held-out table.

    Attributes:
        key: Its key in the manifest.
        what: What was measured.
        nats: Nats per token.
        stderr: Its standard error, None if unknown.
        perplexity: exp(nats), None if it is beyond a float.
        tokens: Tokens it was measured on.
    """

    key: str
    what: str
    nats: float
    stderr: float | None
    perplexity: float | None
    tokens: int


def attention_table(seen: Observations) -> Table | None:
    """How many pairs look ahead, in the base, in the converted model and as it claims."""
    influence = seen.influence
    if influence is None:
        return None
    maps = {"base": influence.base, "converted": influence.converted}
    rows = [(name, *map(_count, map_.ahead)) for name, map_ in maps.items() if map_ is not None]
    claimed = (_count(influence.claimed_ahead), _count(influence.converted.ahead[1]))
    return Table(("pairs that look ahead", "open", "of"), (*rows, ("claimed", *claimed)))


def attention_summary(seen: Observations) -> str | None:
    """Say in a sentence what the influence maps show."""
    influence = seen.influence
    if influence is None:
        return None
    opened, pairs = influence.converted.ahead
    start = f"In the converted model {_count(opened)} of {_count(pairs)} pairs look ahead"
    if influence.base is not None:
        before, of = influence.base.ahead
        start = (
            f"In the base {_count(before)} of {_count(of)} pairs look ahead; "
            f"in the converted model {_count(opened)} do"
        )
    if not influence.opened_as_claimed:
        return f"{start}, not those {_count(influence.claimed_ahead)} that it claims."
    if influence.block_size == 1:
        return f"{start}: text without noise is read from left to right."
    inside = f"exactly those inside a block of {influence.block_size}"
    return f"{start}, {inside if influence.block_size else 'which is all of them'}."


def rates_table(seen: Observations) -> Table | None:
    """Nats per masked token at each mask rate."""
    both = {"before training": seen.rates_before, "after training": seen.rates_after}
    known = {name: points for name, points in both.items() if points}
    if not known:
        return None
    rates = sorted({point.rate for points in known.values() for point in points})
    return Table(
        ("nats per masked token", *(f"{rate:.0%} masked" for rate in rates)),
        tuple((name, *(_at(points, rate) for rate in rates)) for name, points in known.items()),
    )


def _at(points: Sequence[RatePoint], rate: float) -> str:
    point = next((point for point in points if point.rate == rate), None)
    if point is None:
        return ""
    return f"{point.nats:.2f}" + (f" ± {point.stderr:.2f}" if math.isfinite(point.stderr) else "")


def decoding_table(seen: Observations) -> Table | None:
    """Tokens per forward and agreement at each confidence threshold."""
    if not seen.decoding:
        return None
    rows = tuple(
        (
            "one token per forward" if point.threshold is None else f"{point.threshold:g}",
            f"{point.tokens_per_forward:.2f}",
            f"{point.agreement:.0%} of {point.tokens}",
        )
        for point in seen.decoding
    )
    return Table(("confidence threshold", "tokens per forward", "tokens that agree"), rows)


def loss_table(seen: Observations) -> Table | None:
    """Where the training curves begin and end."""
    curves = seen.curves or {}
    rows = tuple(
        (name, *(f"{c.values[i]:.3f} at step {c.steps[i]}" for i in (0, -1)))
        for name, c in curves.items()
    )
    return Table(("nats per token", "first logged", "last logged"), rows) if rows else None


def measures_table(measures: Sequence[Measure]) -> Table:
    """A line per likelihood of held-out text."""
    rows = tuple(
        (
            measure.what,
            figures(measure.nats)
            + ("" if measure.stderr is None else f" ± {figures(measure.stderr, 2)}"),
            "beyond a float" if measure.perplexity is None else figures(measure.perplexity),
            _count(measure.tokens),
        )
        for measure in measures
    )
    return Table(("", "nats per token", "perplexity", "tokens"), rows)


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
    took = {
        "tokens_per_forward": "tokens per forward",
        "tokens_per_second": "tokens per second",
        "writing_seconds": "seconds",
    }
    if not any(row.get("writing_seconds") for row in evaluation.sweep):
        del took["writing_seconds"]
    batches = any(row.get("batch_size") for row in evaluation.sweep)
    header = ("confidence threshold", *(["batch"] if batches else []), "task", "metric", "score")
    rows = tuple(
        (
            f"{row['threshold']:g}",
            *([str(row.get("batch_size") or "")] if batches else []),
            str(row["task"]),
            str(row["metric"]),
            with_interval(row),
            *(_known(row.get(key)) for key in took),
        )
        for row in evaluation.sweep
    )
    return Table((*header, *took.values()), rows)


def evaluation_notes(evaluation: Evaluation) -> Iterator[str]:
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
    for row in evaluation.parallelism:
        yield (
            f"Accuracy under parallelism of {row['task']} {row['metric']}: {_known(row['aup'])} "
            "(area under accuracy in percent over tokens per forward, arXiv 2601.07568); one token "
            f"per forward with the best score that is known here has {_known(row['best'])}."
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


def views_of(manifest: Mapping[str, Any]) -> list[Block]:
    """Return the influence maps, the mask rates and the decoding speeds that a manifest holds."""
    seen = Observations.from_measurements(manifest.get("measurements") or {})
    drawn = sketch(seen)
    maps = [f"Who sees whom: ## the position below sees the token above\n{drawn}"] if drawn else []
    tables = (attention_table(seen), rates_table(seen), decoding_table(seen))
    return [*maps, *(table for table in tables if table is not None)]


def sketch(seen: Observations) -> str | None:
    """Draw the influence maps with plain characters: `##` sees, `..` does not."""
    influence = seen.influence
    if influence is None:
        return None
    maps = {"base": influence.base, "converted": influence.converted}
    drawn = {name: _sketched(map_) for name, map_ in maps.items() if map_ is not None}
    lines = ["  ".join(name.ljust(len(rows[0])) for name, rows in drawn.items())]
    lines += ["  ".join(row) for row in zip_longest(*drawn.values(), fillvalue="")]
    return "\n".join(line.rstrip() for line in lines)


def _sketched(map_: InfluenceMap) -> list[str]:
    """Make cells of several tokens; those of a block fill whole cells."""
    columns = len(map_.rows[0])
    count = max(n for n in range(1, SKETCH + 1) if columns % n == 0)
    every = columns // count

    def seen(row: int, column: int) -> bool:
        # Of each cell the corner that looks least far ahead.
        position = min((row + 1) * every * map_.stride, map_.length) - 1
        return map_.rows[position][column * every] is not None

    cells = range(count)
    return ["".join("##" if seen(row, column) else ".." for column in cells) for row in cells]


def _count(value: int) -> str:
    return f"{value:,}"


def _known(value: float | None) -> str:
    return "none" if value is None else figures(value, 3)
