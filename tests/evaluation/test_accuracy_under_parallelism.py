"""Accuracy under parallelism: the paper's area, computed by hand and by its properties."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.evaluation.parallelism import accuracy_under_parallelism, parallelism


def test_it_is_the_area_of_the_paper() -> None:
    # r = 1, 2, 4 and y = 60, 58, 56; the best is 60: weights 1, exp(-0.1), exp(-0.2).
    weighed = [60.0, 58 * math.exp(-0.1), 56 * math.exp(-0.2)]
    area = 60 + (weighed[0] + weighed[1]) / 2 + 2 * (weighed[1] + weighed[2]) / 2
    points = [(4.0, 56.0), (1.0, 60.0), (2.0, 58.0)]
    assert accuracy_under_parallelism(points, 60.0) == pytest.approx(area, rel=1e-12)
    # Another model's better score makes the loss count more, and not the first point.
    better = accuracy_under_parallelism(points, 70.0)
    assert 60 < better < area
    # More than five points below the first is no setting that counts.
    assert accuracy_under_parallelism([*points, (9.0, 54.9)], 60.0) == pytest.approx(area)
    assert accuracy_under_parallelism([*points, (9.0, 55.0)], 60.0) > area


def test_one_token_per_forward_has_its_accuracy() -> None:
    assert accuracy_under_parallelism([(1.0, 43.2)], 60.0) == 43.2
    assert accuracy_under_parallelism([(1.0, 0.0), (5.0, 0.0)], 0.0) == 0.0
    # Without a loss it is accuracy times parallelism.
    assert accuracy_under_parallelism([(1.0, 50.0), (3.5, 50.0)], 50.0) == pytest.approx(175.0)


def test_faster_or_better_is_never_less() -> None:
    draw = random.Random(0)
    for _ in range(200):
        first = draw.uniform(20, 90)
        points = [(1.0, first)]
        for _ in range(3):
            points.append((points[-1][0] + draw.uniform(0.1, 2), first - draw.uniform(0, 5)))
        best = draw.uniform(90, 100)
        area = accuracy_under_parallelism(points, best)
        faster = [*points[:-1], (points[-1][0] + 1, points[-1][1])]
        surer = [*points[:-1], (points[-1][0], points[-1][1] + 1)]
        assert accuracy_under_parallelism(faster, best) > area
        assert accuracy_under_parallelism(surer, best) > area
        assert accuracy_under_parallelism(points[:-1], best) <= area


def row(threshold: float, value: float, rate: float | None, **more: Any) -> dict[str, Any]:
    known = {"task": "t", "metric": "exact_match", "threshold": threshold, "value": value}
    return {**known, "tokens_per_forward": rate, **more}


def test_rows_of_a_sweep() -> None:
    sweep = [
        *(
            row(t, v, r, batch_size=b)
            for b in (1, 8)
            for t, v, r in ((1.0, 0.6, 1.0), (0.5, 0.6, 2))
        ),
        row(0.1, 0.9, None),
        row(1.0, 12.5, 1.0) | {"metric": "perplexity"},
    ]
    results = [{"task": "t", "metric": "exact_match", "before": {"value": 0.8},
                "after": {"value": 0.6}}]  # fmt: skip
    (found,) = parallelism(sweep, results)
    assert (found["task"], found["metric"], found["best"]) == ("t", "exact_match", 80.0)
    assert found["thresholds"] == [0.5, 1.0]
    assert found["aup"] == pytest.approx(60 + 60 * math.exp(-0.75), abs=1e-3)
    assert parallelism([], results) == []
    # What is more than five points worse than the slowest does not count.
    fast = [row(t, v, r) for t, v, r in ((0.9, 0.6, 1.0), (0.7, 0.58, 2), (0.5, 0.4, 4))]
    assert parallelism(fast, [])[0]["thresholds"] == [0.7, 0.9]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--batch-sizes", "1,8"), "none is given"),
        (("--thresholds", "0.5", "--batch-sizes", "0"), "no number of prompts"),
        (("--thresholds", "0.5", "--batch-sizes", "two"), "no number of prompts"),
    ],
)
def test_what_cannot_be_swept_ends_with_2(more: tuple[str, ...], said: str, tmp_path: Path) -> None:
    line = ["evaluate", str(tmp_path), "--tasks", "dllm_copy", *more]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr
