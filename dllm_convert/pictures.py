"""Pictures of a run for its card, drawn from what training and evaluation wrote down."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Picture:
    """A picture the card shows where its file lies in the folder.

    Attributes:
        file: Its name.
        alt: What it shows, for those who cannot see it.
        caption: A sentence beneath it.
    """

    file: str
    alt: str
    caption: str


LOSS = Picture(
    "loss.png",
    "Line chart of the training loss and of the training NELBO, in nats per token, over optimizer "
    "steps",
    "Training loss and NELBO per logged step, thin, and their running median, thick; crosses are "
    "the NELBO on held-out text before and after.",
)
PICTURES = (LOSS,)
PARALLELISM = Picture(
    "parallelism.png",
    "Line chart of the score of each task over the tokens written per forward pass, a point per "
    "confidence threshold",
    "Score against tokens per forward, a point per confidence threshold, with 95 % intervals over "
    "items.",
)
DENOISING = Picture(
    "sample.gif",
    "Animation of the sample above: grey boxes stand for masked tokens and turn into text, one "
    "forward pass after the other, with the newest tokens highlighted",
    "The same text while it was denoised; grey is not written yet, orange was written last.",
)

GREY = "#767676"
"""Of text and axes: contrast above 4 against white and against the Hub's dark page."""
BLUE = "#0072b2"
VERMILION = "#d55e00"
"""Blue and vermilion of Okabe and Ito: apart for every colour vision, 3:1 on white and on dark."""

_COLOURS = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00")

_WINDOW = 15


@dataclass(frozen=True)
class Curve:
    """One logged quantity.

    Attributes:
        steps: Optimizer steps.
        values: Nats per token.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_curves(metrics: Path) -> dict[str, Curve]:
    """Read `loss` and `nelbo` from metrics.jsonl; what is broken or missing is left out.

    Args:
        metrics: File of one JSON object per logged step.
    """
    rows: list[Mapping[str, Any]] = []
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    curves = {}
    for name in ("loss", "nelbo"):
        found = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
        if len(found) > 1:
            curves[name] = Curve(*(tuple(column) for column in zip(*found, strict=True)))
    return curves


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def running_median(values: Sequence[float], window: int = _WINDOW) -> list[float]:
    """Return the median of up to `window` values around each."""
    from statistics import median

    half = window // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw_loss(metrics: Path, measurements: Mapping[str, Any], out: Path) -> bool:
    """Draw the loss over the steps, readable on light and on dark pages.

    Args:
        metrics: metrics.jsonl of the run.
        measurements: Section of the manifest, for the held-out values.
        out: PNG to write.

    Returns:
        Whether there was anything to draw; otherwise nothing is written.
    """
    curves = read_curves(metrics)
    if not curves:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    same = _same(curves.get("loss"), curves.get("nelbo"))
    label = "training loss, the NELBO" if same else "training loss"
    _draw_curve(axes, curves.get("loss"), BLUE, "-", label)
    if not same:
        _draw_curve(axes, curves.get("nelbo"), VERMILION, "--", "training NELBO")
    last = max(curve.steps[-1] for curve in curves.values())
    _draw_held_out(axes, measurements, last)
    _style(axes, "optimizer step", "nats per token")
    # Without a date or a version inside, the same run gives the same file.
    figure.savefig(out, transparent=True, metadata={"Software": None})
    return True


def draw_parallelism(sweep: Sequence[Mapping[str, Any]], out: Path) -> bool:
    """Draw what writing several tokens per forward costs, readable on light and on dark pages.

    Args:
        sweep: Section `evaluation.sweep` of the manifest.
        out: PNG to write.

    Returns:
        Whether there was anything to draw; otherwise nothing is written.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sweep:
        if row.get("tokens_per_forward"):
            lines.setdefault(f"{row['task']}, {row['metric']}", []).append(row)
    if not lines:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = zip(_COLOURS, "osD^v", strict=True)
    for (label, rows), (colour, marker) in zip(lines.items(), cycle(styles), strict=False):
        rows.sort(key=lambda row: float(row["tokens_per_forward"]))
        axes.errorbar(
            [row["tokens_per_forward"] for row in rows],
            [row["value"] for row in rows],
            [row["half_width"] or 0 for row in rows],
            color=colour,
            marker=marker,
            capsize=3,
            label=label,
        )
        for row in rows:
            axes.annotate(
                f"{row['threshold']:g}",
                (row["tokens_per_forward"], row["value"]),
                (4, 4),
                textcoords="offset points",
                color=GREY,
            )
    _style(axes, "tokens per forward", "score")
    figure.savefig(out, transparent=True, metadata={"Software": None})
    return True


def _same(loss: Curve | None, nelbo: Curve | None) -> bool:
    """Whether the loss is the bound itself, which one line shows better than two."""
    if loss is None or nelbo is None or loss.steps != nelbo.steps:
        return False
    return all(abs(a - b) <= 1e-3 for a, b in zip(loss.values, nelbo.values, strict=True))


def _draw_curve(axes: Axes, curve: Curve | None, colour: str, line: str, label: str) -> None:
    if curve is None:
        return
    axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.4)
    smooth = running_median(curve.values)
    axes.plot(curve.steps, smooth, color=colour, linewidth=2, linestyle=line, label=label)


def _draw_held_out(axes: Axes, measurements: Mapping[str, Any], last: int) -> None:
    points = [
        (step, float(measurements[key]["nats_per_token"]))
        for step, key in ((0, "nelbo_before"), (last, "nelbo_after"))
        if measurements.get(key)
    ]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            linestyle="none",
            marker="X",
            markersize=9,
            color=GREY,
            label="held-out NELBO",
        )
    base = measurements.get("ar_nll")
    if base:
        value = float(base["nats_per_token"])
        axes.axhline(value, color=GREY, linestyle=":", label="base, autoregressive")


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(visible=True, color=GREY, alpha=0.25, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY)
