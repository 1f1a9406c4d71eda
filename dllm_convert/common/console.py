"""The one place that writes to stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from dllm_convert.common.bar import ENDS, NOTES, Bars, left_text
from dllm_convert.common.shown_text import one_line

PLAIN_INTERVAL_S = 5.0


class _Console(Console):
    """A console whose reader may leave, as with `2>&1 | head`: the work goes on unseen."""

    def on_broken_pipe(self) -> None:
        """Be quiet from now on, instead of ending the program."""
        self.quiet = True


class Task:
    """A counter somebody may be watching."""

    def __init__(self, reporter: Reporter, description: str, total: float | None) -> None:
        self._reporter = reporter
        self._description = description
        self._total = total
        self._done = self._began = 0.0
        self._last_line = self._started = time.monotonic()
        self._until: float | None = None
        bar = reporter.bar
        fields: dict[str, Any] = {NOTES: (), ENDS: None}
        self._id = bar.add_task(description, total=total, **fields) if bar else None

    @property
    def done(self) -> float:
        """How much is done, what an earlier session did included."""
        return self._done

    def begin(self, done: float) -> None:
        """Start from what an earlier session did; only what comes after says how fast it goes."""
        self._done = self._began = done
        self._started = time.monotonic()
        if self._reporter.bar is not None and self._id is not None:
            fields: dict[str, Any] = {NOTES: (), ENDS: None}
            self._reporter.bar.reset(self._id, completed=int(done), **fields)

    def expect(self, total: float | None = None, *, seconds: float | None = None) -> None:
        """Say what is known by now of how much there is to do.

        Args:
            total: All of it, counted as `advance` does, if that is another number than was said.
            seconds: How long it will take from now on at most, whatever the pace; None: as long as
                the pace says.
        """
        self._total = self._total if total is None else total
        self._until = None if seconds is None else time.monotonic() + seconds
        if self._reporter.bar is not None and self._id is not None:
            fields: dict[str, Any] = {ENDS: self._ends()}
            self._reporter.bar.update(self._id, total=self._total, **fields)

    def advance(self, amount: float = 1.0, *notes: str) -> None:
        """Count `amount` more.

        Args:
            amount: How much was done.
            *notes: What else is known, such as the loss; what matters most first.
        """
        self._done += amount
        bar = self._reporter.bar
        if bar is not None and self._id is not None:
            fields: dict[str, Any] = {NOTES: notes, ENDS: self._ends()}
            bar.update(self._id, advance=amount, **fields)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            share = f"{self._done:g}/{self._total:g}" if self._total else f"{self._done:g}"
            parts = [part for part in (share, *notes, left_text(self._ends())) if part]
            self._reporter.line(f"{self._description}: {', '.join(parts)}")

    def _ends(self) -> float | None:
        """When it will be done: at the pace so far, no later than was told."""
        advanced = self._done - self._began
        if not self._total or advanced <= 0:
            return self._until
        now = time.monotonic()
        ends = now + (now - self._started) / advanced * max(self._total - self._done, 0)
        return ends if self._until is None else min(ends, self._until)


class Reporter:
    """Progress and messages of one command, all on stderr.

    Args:
        quiet: Print nothing but warnings.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.bar: Bars | None = None

    @property
    def live(self) -> bool:
        """Whether bars can be drawn."""
        return self.console.is_terminal and not self.quiet

    def line(self, text: str, *, faint: bool = False) -> None:
        """Print one plain line; `faint` where it stands beside what counts."""
        if not self.quiet:
            self._print(text, style="dim" if faint else None)

    def warn(self, text: str) -> None:
        """Print a warning, even when quiet."""
        self._print(f"warning: {text}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        # Hours of work do not end because nobody reads of them any more.
        with suppress(OSError):
            self.console.print(one_line(text), markup=False, style=style)

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Show `description` until the block ends; `total` in whatever `advance` counts."""
        started = time.monotonic()
        outer = self.bar is None and self.live
        if outer:
            self.bar = Bars(console=self.console, transient=True)
            self.bar.start()
        elif not self.live:
            self.line(f"{description} ...")
        try:
            yield Task(self, description, total)
        finally:
            if outer and self.bar is not None:
                self.bar.stop()
                self.bar = None
        self.line(f"{description}: {time.monotonic() - started:.1f} s")
