"""The picture of an evaluation: scores against tokens per forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_convert.card.charts import score_figure
from dllm_convert.card.pictures import Picture

PARALLELISM = Picture(
    "parallelism.png",
    "score_figure",
    "evaluation",
    "Scores, and what parallelism costs",
    "Line chart of the score of each task over the tokens written per forward pass, a point per "
    "confidence threshold",
    "Score against tokens per forward, a point per confidence threshold, with 95 % intervals over "
    "items.",
)


def drawable(sweep: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that have a place on the curve: those that wrote anything.

    Of several batch sizes the first is drawn: they write the same.
    """
    places: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in sweep:
        if row.get("tokens_per_forward"):
            places.setdefault((row["task"], row["metric"], row["threshold"]), row)
    return list(places.values())


def draw_parallelism(sweep: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """Draw what writing several tokens per forward costs.

    Args:
        sweep: Section `evaluation.sweep` of the manifest.
        folder: Where the file is written; one that is there and has nothing to show is removed.

    Returns:
        Whether there was anything to draw.
    """
    path = folder / PARALLELISM.file
    figure = score_figure(drawable(sweep))
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    figure.savefig(path, transparent=True, metadata={"Software": None})
    return True
