"""A text while it is denoised: redrawn on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from dllm_convert.common.colours import BLUE, GREEN, GREY, VERMILION
from dllm_convert.common.console import PLAIN_INTERVAL_S, Reporter
from dllm_convert.sampling.watch.cells import UNVERIFIED, Cell, State, caption, cells_of, plain
from dllm_convert.sampling.watch.frames import Film, Recorder
from dllm_convert.sampling.watch.layout import Line, wrap
from dllm_convert.sampling.watch.pieces import TokenText

if TYPE_CHECKING:
    from dllm_convert.modeling.published.options import Progress

REFRESH_PER_SECOND = 12
_BUSY = UNVERIFIED | {State.MASKED}
_MARGIN = 1
_LINE_COLUMNS = 100
"""Text on a plain line, the end of what is written so far."""

_MASKS = {State.MASKED: ("\N{MEDIUM SHADE}", "_"), State.WAITING: ("\N{MIDDLE DOT}", ".")}
_STATE_STYLES = {
    State.PROMPT: BLUE,
    State.MASKED: GREY,
    State.WAITING: GREY,
    State.WRITTEN: "",
    State.DRAFTED: f"italic {GREY}",
    State.REJECTED: f"strike {GREY}",
}
# What is new is also bold, underlined or reversed: NO_COLOR and some eyes leave nothing else.
_AGE_STYLES = (f"bold reverse {VERMILION}", f"bold underline {VERMILION}", VERMILION)
_HELD_STYLE = f"bold italic reverse {GREEN}"
"""Of a token that was drafted, in the frame in which the verifier wrote it."""


def mask_sign(state: State, encoding: str) -> str:
    """Return the glyph of a position that is not written, one the encoding has."""
    sign, ascii_sign = _MASKS[state]
    return sign if encoding.lower().startswith("utf") else ascii_sign


def style_of(cell: Cell) -> str:
    """Return the rich style of a cell."""
    if cell.held:
        return _HELD_STYLE
    if cell.state is State.WRITTEN and cell.age < len(_AGE_STYLES):
        return _AGE_STYLES[cell.age]
    return _STATE_STYLES[cell.state]


def window(lines: Sequence[Line], cells: Sequence[Cell], height: int) -> Sequence[Line]:
    """Choose the lines to show where there is no room for all: around where it is being written.

    Args:
        lines: All lines.
        cells: The cells they are made of.
        height: Lines there is room for.
    """
    if len(lines) <= height:
        return lines
    masked = (number for number, cell in enumerate(cells) if cell.state in _BUSY)
    first = next(masked, len(cells))
    busy = next((n for n, line in enumerate(lines) if line[-1].cell >= first), len(lines) - 1)
    start = min(max(busy - height // 2, 0), len(lines) - height)
    return lines[start : start + height]


class Scene:
    """What is on the screen: every row's text, and beneath it how far it is.

    Args:
        recorder: Where the frames come from.
        text: Texts of tokens.
        prompt: Whether the prompt is shown too.
    """

    def __init__(self, recorder: Recorder, text: TokenText, *, prompt: bool = True) -> None:
        self._recorder = recorder
        self._text = text
        self._prompt = prompt

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the newest frames into the room there is now."""
        shown = self.films()
        columns = max(options.max_width - 2 * _MARGIN, 2)
        room = max(console.size.height // max(len(shown), 1) - 2, 1)
        for film, number in shown:
            cells = self._cells(film, number)
            signed = [
                Cell(mask_sign(cell.state, options.encoding), cell.state)
                if cell.state in _MASKS
                else cell
                for cell in cells
            ]
            lines = window(wrap([cell.text for cell in signed], columns), cells, room)
            for line in lines:
                yield _drawn(line, signed)
            words = f"{' ' * _MARGIN}{caption(film, film.frames[-1])}"
            yield Text(set_cell_size(words, min(cell_len(words), options.max_width)), style=GREY)
            yield Text("")

    def _cells(self, film: Film, number: int) -> Sequence[Cell]:
        cells = cells_of(film, film.frames[-1], number, self._text)
        return [cell for cell in cells if self._prompt or cell.state is not State.PROMPT]

    def films(self) -> list[tuple[Film, int]]:
        """Return the newest frame of each row, and its number."""
        found = (self._recorder.latest(row) for row in range(self._recorder.rows))
        return [latest for latest in found if latest is not None]

    def lines(self, encoding: str) -> list[str]:
        """Return one plain line for each row: how far it is, and the end of its text."""
        mask, lines = mask_sign(State.MASKED, encoding), []
        for film, number in self.films():
            cells = self._cells(film, number)
            shown = plain(cells, mask).rstrip(mask)[-_LINE_COLUMNS:]
            lines.append(f"{caption(film, film.frames[-1])}: {shown}")
        return lines


def _drawn(line: Line, cells: Sequence[Cell]) -> Text:
    drawn = Text(" " * _MARGIN, no_wrap=True, end="\n")
    for segment in line:
        cell = cells[segment.cell]
        # The space in front of a word stays plain, on whichever line it is.
        word = segment.text.lstrip(" ") if cell.text.strip(" ") else segment.text
        drawn.append(segment.text[: len(segment.text) - len(word)])
        drawn.append(word, style=style_of(cell))
    return drawn


class Watcher:
    """An observer of decoding that shows its recorder's frames while the block runs.

    On a terminal the other screen is used, so that text longer than the terminal, a resize and an
    interruption leave nothing behind; an interrupted text is then repeated as a plain line.

    Args:
        recorder: Keeps the frames; called first.
        text: Texts of tokens.
        reporter: Where it is shown.
        screen: Whether to take the other screen; otherwise the new text alone is drawn below what
            is there, and taken away when the block ends.
    """

    def __init__(
        self, recorder: Recorder, text: TokenText, reporter: Reporter, *, screen: bool = True
    ) -> None:
        self._recorder = recorder
        self._reporter = reporter
        self._screen = screen
        self._scene = Scene(recorder, text, prompt=screen)
        self._last_line = time.monotonic()
        self._live: AbstractContextManager[Any] = nullcontext()
        self._has_drawn = False
        self._redraws = reporter.live and not reporter.console.is_dumb_terminal

    def __call__(self, progress: Progress) -> None:
        """Record, and show if it is time to."""
        self._recorder(progress)
        if isinstance(self._live, Live) and not self._has_drawn:
            # However little is left to write, it is seen to begin.
            self._has_drawn = True
            self._live.refresh()
        if not self._redraws and time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self._say()

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._redraws:
            self._live = Live(
                self._scene,
                console=self._reporter.console,
                screen=self._screen,
                transient=True,
                refresh_per_second=REFRESH_PER_SECOND,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        self._live.__exit__(kind, error, trace)
        if kind is not None and self._screen:
            self._say()

    def _say(self) -> None:
        for line in self._scene.lines(self._reporter.console.encoding):
            self._reporter.line(line)
