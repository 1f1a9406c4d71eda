"""The line of progress: what goes where there is no room, and how long it will take."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dllm_convert.common import bar, console
from dllm_convert.common.bar import Part, fitted
from dllm_convert.common.console import Reporter

NOTES = ("loss 7.123", "nelbo 8.456", "12,345 tokens/s", "63.21 GiB")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    for module in (bar, console):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def reporter_of(width: int) -> Reporter:
    reporter = Reporter()
    reporter.console = Console(
        file=StringIO(), force_terminal=True, width=width, height=12, soft_wrap=True, no_color=True
    )
    return reporter


def line_of(width: int, clock: list[float], notes: tuple[str, ...] = NOTES) -> str:
    reporter = reporter_of(width)
    with reporter.task("train", total=60) as task:
        clock[0] += 10
        task.advance(25, *notes)
        # A console of its own: the reporter's draws the bar anew at every print.
        paper = Console(file=StringIO(), force_terminal=True, width=width, no_color=True)
        with paper.capture() as seen:
            for row in reporter.bar.get_renderables():  # type: ignore[union-attr]
                paper.print(row)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.get()).rstrip("\n").split("\n")
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("width", [12, 16, 20, 30, 40, 60, 80, 100, 132, 200])
def test_the_line_fits_and_keeps_how_long_it_will_take(width: int, clock: list[float]) -> None:
    line = line_of(width, clock)
    assert cell_len(line) <= width
    assert line.rstrip().endswith("0:00:14 left")


def test_what_matters_least_goes_first(clock: list[float]) -> None:
    widths = range(12, 140)
    words = ("left", "train", "25/60", "loss", "━", "nelbo", "tokens/s", "GiB")
    first = [next(w for w in widths if word in line_of(w, clock)) for word in words]
    assert first == sorted(first)
    assert all(word in line_of(80, clock) for word in ("train", "25/60", "loss 7.123", "nelbo"))
    assert all(note in line_of(132, clock) for note in NOTES)


def test_an_overlong_name_makes_no_second_line(clock: list[float]) -> None:
    assert [part.text for part in fitted([Part("x" * 50, 1), Part("left", 0)], 20)] == ["left"]
    assert cell_len(line_of(40, clock, ("世界" * 40,))) <= 40


def test_what_is_expected_is_told_until_the_pace_says_more(clock: list[float]) -> None:
    reporter = reporter_of(80)
    with reporter.task("train", total=1000) as task:

        def left() -> Any:
            return bar.left_text(reporter.bar.tasks[0].fields[bar.ENDS])  # type: ignore[union-attr]

        task.begin(0)
        assert left() == ""
        task.expect(seconds=90)
        assert left() == "0:01:30 left"
        clock[0] += 10
        task.advance(1)
        assert left() == "0:01:20 left"
        task.expect(9)
        assert left() == "0:01:20 left", "eight more steps of ten seconds"
        clock[0] += 10
        assert left() == "0:01:10 left", "between steps too"
        task.advance(1)
        assert left() == "0:01:10 left"


def test_steps_that_end_before_the_time_limit_say_so(clock: list[float]) -> None:
    reporter = reporter_of(80)
    with reporter.task("train", total=40) as task:
        task.begin(0)
        task.expect(seconds=1200)
        for step in range(1, 5):
            clock[0] += 2
            task.advance(1)
            left = bar.left_text(reporter.bar.tasks[0].fields[bar.ENDS])  # type: ignore[union-attr]
            assert left == f"0:01:{(40 - step) * 2 - 60:02d} left", "not the 20 minutes there are"


def test_plain_lines_say_the_same(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    reporter, said = Reporter(), list[str]()
    reporter.console = Console(file=StringIO(), force_terminal=False)
    monkeypatch.setattr(reporter, "line", said.append)
    with reporter.task("train", total=60) as task:
        clock[0] += 10
        task.advance(25, *NOTES)
    assert said[1] == f"train: 25/60, {', '.join(NOTES)}, 0:00:14 left"
