"""One line of progress, as much of it as the terminal is wide: what matters least goes first."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ENDS = "ends"
"""Field of a task: when it will be done, on the clock of `time.monotonic`; None if unknown."""
NOTES = "notes"
"""Field of a task: what else is known, what matters most first."""

_BAR = range(8, 41)
"""Columns a bar may take."""
_GAP = 2


@dataclass(frozen=True)
class Part:
    """Something a line may say.

    Attributes:
        text: The words.
        rank: What is dropped first where there is no room: the largest.
    """

    text: str
    rank: int


def fitted(parts: Sequence[Part], columns: int) -> list[Part]:
    """Return the parts that fit side by side, in their order.

    A part that does not fit is left out, and so is everything that matters less: a line does not
    change what it shows with the length of a number. The first in rank is always there.

    Args:
        parts: In the order they are shown in; empty ones take no room.
        columns: Width of the line.
    """
    kept: list[Part] = []
    room = columns
    for part in sorted(filter(lambda part: part.text, parts), key=lambda part: part.rank):
        room -= cell_len(part.text) + (_GAP if kept else 0)
        if room < 0 and kept:
            break
        kept.append(part)
    return [part for part in parts if part in kept]


def time_text(seconds: float) -> str:
    """Return a time as clocks have it: 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def left_text(ends: float | None) -> str:
    """Return how long it is until a moment of `time.monotonic`, as in `1:02:03 left`."""
    return "" if ends is None else f"{time_text(max(ends - time.monotonic(), 0))} left"


class Bars(Progress):
    """Rich's progress, every task of which is one line that never wraps."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return a line for each task that is shown."""
        for task in self.tasks:
            if task.visible:
                yield _Line(task)


@dataclass(frozen=True)
class _Line:
    """A task in as many columns as there are."""

    task: Task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task, columns = self.task, options.max_width
        counted = task.total is not None and task.total < _LARGE
        count = f"{task.completed:g}/{task.total:g}" if counted else ""
        name, left, elapsed = (
            Part(task.description, 1),
            Part(left_text(task.fields[ENDS]), 0),
            Part(time_text(task.elapsed or 0), 5),
        )
        # The bar has a place in the order as if it were words of its least width.
        bar = Part("=" * _BAR.start if task.total else "", 4)
        notes = [Part(note, 3 if n == 0 else 5 + n) for n, note in enumerate(task.fields[NOTES])]
        shown = fitted([name, bar, Part(count, 2), *notes, elapsed, left], columns)
        spare = columns - sum(cell_len(part.text) + _GAP for part in shown) + _GAP
        table = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        cells: list[RenderableType] = []
        for part in shown:
            table.add_column(no_wrap=True)
            if part is bar:
                width = min(_BAR.start + max(spare, 0), _BAR.stop - 1)
                cells.append(ProgressBar(total=task.total, completed=task.completed, width=width))
            else:
                room = min(cell_len(part.text), columns)
                cells.append(Text(set_cell_size(part.text, room)))
        table.add_row(*cells)
        yield table


_LARGE = 1e7
"""Where counts are bytes rather than things, whose digits say nothing."""
