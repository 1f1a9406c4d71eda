"""Figures with matplotlib, readable on light and on dark pages and for every colour vision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from dllm_convert.common.colours import BLUE, GREY, VERMILION
from dllm_convert.verification.observe.logged import Curve
from dllm_convert.verification.observe.observations import (
    Influence,
    InfluenceMap,
    Observations,
    RatePoint,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHUT = "#1b1b1f"
"""Of pairs that do not see each other: darker than every colour of those that do, 3:1."""
FAINTEST_LEVEL = 90
"""First of viridis' 256 colours that is used."""

_SEVERAL = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00")
_WINDOW = 15
_FAINTEST, _STRONGEST = -3, 0


def attention_figure(seen: Observations) -> Figure | None:
    """Draw the influence maps of the base and of the converted model side by side."""
    influence = seen.influence
    if influence is None:
        return None
    panels = [("Converted", influence.converted)]
    if influence.base is not None:
        panels.insert(0, ("Base", influence.base))
    two = len(panels) == 2
    figure = _figure(9.2 if two else 5.4, 4.5)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    left, right = (0.075, 0.87) if two else (0.13, 0.79)
    figure.subplots_adjust(left=left, right=right, bottom=0.12, top=0.88, wspace=0.12)
    image: Any = None
    for one, (name, map_) in zip(axes, panels, strict=True):
        image = _draw_map(one, map_, name, influence)
    axes[0].set_ylabel("position whose prediction moves", color=GREY)
    low, high = axes[-1].get_position().get_points()
    place = (right + 0.03, low[1], 0.018 if two else 0.03, high[1] - low[1])
    bar = figure.colorbar(image, cax=figure.add_axes(place))
    bar.set_label("change of a logit, share of the largest", color=GREY)
    bar.ax.tick_params(colors=GREY)
    ticks = range(_FAINTEST, _STRONGEST + 1)
    bar.set_ticks(list(ticks), labels=[f"{10.0**tick:g}" for tick in ticks])
    bar.outline.set_visible(False)
    return figure


def _draw_map(axes: Axes, map_: InfluenceMap, name: str, influence: Influence) -> Any:
    import matplotlib
    from matplotlib.colors import ListedColormap

    length = map_.length
    bright = [matplotlib.colormaps["viridis"](level) for level in range(FAINTEST_LEVEL, 256)]
    colours = ListedColormap(bright).with_extremes(bad=SHUT)
    width = len(map_.rows[0]) * map_.stride
    image = axes.imshow(
        [[float("nan") if value is None else value for value in row] for row in map_.rows],
        cmap=colours,
        vmin=_FAINTEST,
        vmax=_STRONGEST,
        interpolation="nearest",
        aspect="auto",
        extent=(0, width, length, 0),
    )
    axes.set_box_aspect(1)
    axes.set_xlim(0, length)
    opened, pairs = map_.ahead
    title = f"{name}: {opened:,} of {pairs:,} pairs look ahead"
    axes.set_title(title, color=GREY, fontsize=11, fontweight="bold")
    axes.set_xlabel("token that is changed", color=GREY)
    size = influence.block_size or 0
    step = size if size and length // size <= 8 else max(length // 4, 1)
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(range(0, length + 1, step))
    axes.tick_params(colors=GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    return image


def loss_figure(seen: Observations) -> Figure | None:
    """Draw loss and NELBO over the steps, with the held-out values."""
    curves = seen.curves or {}
    if not curves:
        return None
    figure, axes = _one_chart()
    loss, nelbo = curves.get("loss"), curves.get("nelbo")
    same = _same(loss, nelbo)
    label = "training loss, the NELBO" if same else "training loss"
    _draw_curve(axes, loss, BLUE, "-", label)
    if not same:
        _draw_curve(axes, nelbo, VERMILION, "--", "training NELBO")
    held_out = seen.held_out or {}
    last = max(curve.steps[-1] for curve in curves.values())
    ends = {"nelbo_before": 0, "nelbo_after": last}
    points = [(step, held_out[key]) for key, step in ends.items() if key in held_out]
    if points:
        marks: Mapping[str, Any] = {"linestyle": "none", "marker": "X", "markersize": 9}
        axes.plot(*zip(*points, strict=True), **marks, color=GREY, label="held-out NELBO")
    _draw_base(axes, held_out)
    _style(axes, "optimizer step", "nats per token")
    return figure


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


def running_median(values: Sequence[float], window: int = _WINDOW) -> list[float]:
    """Return the median of up to `window` values around each."""
    half = window // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _draw_base(axes: Axes, held_out: Mapping[str, float]) -> None:
    if "ar_nll" in held_out:
        axes.axhline(held_out["ar_nll"], color=GREY, linestyle=":", label="base, autoregressive")


def rates_figure(seen: Observations) -> Figure | None:
    """Draw what a masked token costs over the share of tokens that are masked."""
    if not (seen.rates_before or seen.rates_after):
        return None
    figure, axes = _one_chart()
    _draw_rates(axes, seen.rates_before, VERMILION, "--", "s", "before training")
    _draw_rates(axes, seen.rates_after, BLUE, "-", "o", "after training")
    _draw_base(axes, seen.held_out or {})
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _style(axes, "share of the tokens that are masked", "nats per masked token")
    return figure


def _draw_rates(
    axes: Axes, points: Sequence[RatePoint], colour: str, line: str, marker: str, label: str
) -> None:
    if not points:
        return
    axes.errorbar(
        [point.rate for point in points],
        [point.nats for point in points],
        yerr=[point.stderr if point.stderr < float("inf") else 0.0 for point in points],
        color=colour,
        linestyle=line,
        marker=marker,
        linewidth=2,
        capsize=3,
        elinewidth=1,
        label=label,
    )


def decoding_figure(seen: Observations) -> Figure | None:
    """Draw agreement with one token per forward over the tokens per forward."""
    if not seen.decoding:
        return None
    figure, axes = _one_chart()
    speeds = [point.tokens_per_forward for point in seen.decoding]
    shares = [point.agreement for point in seen.decoding]
    axes.plot(
        speeds[1:], shares[1:], color=BLUE, marker="o", linewidth=2, label="confidence threshold"
    )
    marks: Mapping[str, Any] = {"linestyle": "none", "marker": "X", "markersize": 10}
    axes.plot(speeds[:1], shares[:1], **marks, color=VERMILION, label="one token per forward")
    top = 1.12 * max(speeds)
    points = [(p.tokens_per_forward, p.agreement, p.threshold) for p in seen.decoding[1:]]
    _label(axes, points, top)
    axes.set_xlim(0, top)
    axes.set_ylim(-0.03, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _style(axes, "tokens per forward", "share of tokens that agree", legend="lower left")
    return figure


def score_figure(sweep: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the score of each task over the tokens per forward, by confidence threshold.

    Args:
        sweep: Rows with `task`, `metric`, `threshold`, `tokens_per_forward`, `value` and the
            `half_width` of its interval.
    """
    if not sweep:
        return None
    figure, axes = _one_chart()
    top = 1.12 * max(float(row["tokens_per_forward"]) for row in sweep)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sweep:
        lines.setdefault(f"{row['task']}, {row['metric']}", []).append(row)
    for number, (label, rows) in enumerate(lines.items()):
        rows.sort(key=lambda row: float(row["tokens_per_forward"]))
        speeds = [row["tokens_per_forward"] for row in rows]
        scores = [row["value"] for row in rows]
        axes.errorbar(
            speeds,
            scores,
            [row["half_width"] or 0 for row in rows],
            color=_SEVERAL[number % len(_SEVERAL)],
            marker="osD^v"[number % 5],
            capsize=3,
            label=label,
        )
        points = [(row["tokens_per_forward"], row["value"], row["threshold"]) for row in rows]
        _label(axes, points, top)
    axes.set_xlim(0, top)
    if all(0 <= row["value"] <= 1 for row in sweep):
        highest = max(row["value"] + (row["half_width"] or 0) for row in sweep)
        axes.set_ylim(-0.03, 1.12 * max(highest, 0.25))
    _style(axes, "tokens per forward", "score")
    return figure


def _label(axes: Axes, points: Iterable[tuple[float, float, float | None]], top: float) -> None:
    """Write thresholds beside their points, towards the middle where the edge is near."""
    for place, label in _threshold_labels(points, top):
        inward = -1 if place[0] > 0.8 * top else 1
        side = "right" if inward < 0 else "left"
        offset: Mapping[str, Any] = {"xytext": (7 * inward, 8), "textcoords": "offset points"}
        axes.annotate(label, place, color=GREY, ha=side, **offset)


def _threshold_labels(
    points: Iterable[tuple[float, float, float | None]], width: float
) -> list[tuple[tuple[float, float], str]]:
    """Return where a label stands and what it says; points that nearly coincide share one."""
    labels: list[tuple[tuple[float, float], str]] = []
    for across, up, threshold in points:
        place, text = (across, up), f"{threshold:g}"
        if labels:
            (x, y), before = labels[-1]
            if abs(place[0] - x) < 0.06 * width and abs(place[1] - y) < 0.08:
                labels[-1] = (place, f"{before}, {text}")
                continue
        labels.append((place, text))
    return labels


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    return figure


def _one_chart() -> tuple[Figure, Axes]:
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    # Fixed margins: working them out takes longer than all the rest.
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.14, top=0.97)
    return figure, axes


def _style(axes: Axes, across: str, up: str, legend: Any = "best") -> None:
    axes.set_xlabel(across, color=GREY)
    axes.set_ylabel(up, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(visible=True, color=GREY, alpha=0.25, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY, loc=legend)
