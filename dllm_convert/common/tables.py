"""Results for people: lines and tables, for a terminal and as HTML for a notebook or a page."""

from __future__ import annotations

import html
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dllm_convert.common.shown_text import one_line, printable

_NOTEBOOK = (
    "<style scoped>.dllm-convert th, .dllm-convert td { text-align: left; vertical-align: top }"
    ".dllm-convert pre { white-space: pre }</style>"
)
"""Notebooks put cells to the right, and wrap what is aligned."""


@dataclass(frozen=True)
class Table:
    """Words and numbers in rows.

    Attributes:
        header: Names of the columns; the first is that of the rows' names. Where none has a name
            there is no line of them.
        rows: As many values each.
        notes: By the number of a row, lines that stand below it.
        indent: Blanks in front of every line on a terminal.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Mapping[int, Sequence[str]] = field(default_factory=dict)
    indent: int = 0

    @property
    def cells(self) -> list[list[str]]:
        """The rows as texts."""
        return [[cell_text(value) for value in row] for row in self.rows]

    def __str__(self) -> str:
        """Return aligned columns; the last one is as wide as it needs."""
        cells = [list(self.header), *self.cells]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.header))]
        lines = []
        for number, row in enumerate(cells, -1):
            if not any(row) and number < 0:
                continue
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
            lines += [f"{'':9}{one_line(note)}" for note in self.notes.get(number, ())]
        return "\n".join(f"{'':{self.indent}}{line}" if line else "" for line in lines)

    def as_html(self, caption: str = "") -> str:
        """Return an HTML table in which every value is escaped.

        Args:
            caption: What it shows, for those who cannot see it; empty for none.
        """
        head = "".join(
            f'<th scope="col">{_escaped(name)}</th>' if name else "<td></td>"
            for name in self.header
        )
        lines = [f'<caption class="unseen">{_escaped(caption)}</caption>'] if caption else []
        lines += [f"<thead><tr>{head}</tr></thead>"] if any(self.header) else []
        lines.append("<tbody>")
        for number, (first, *others) in enumerate(self.cells):
            named = f'<th scope="row">{_escaped(first)}</th>'
            lines.append(
                f"<tr>{named}{''.join(f'<td>{_escaped(one)}</td>' for one in others)}</tr>"
            )
            lines += [
                f'<tr><td></td><td colspan="{len(others)}">{_escaped(note)}</td></tr>'
                for note in self.notes.get(number, ())
            ]
        return "\n".join(["<table>", *lines, "</tbody></table>"])


class Toned(str):
    """A line that has a colour where there are any; its words say the same.

    Args:
        text: The line.
        tone: Key of `TONES`.
    """

    tone: str

    def __new__(cls, text: str, tone: str) -> Toned:
        """Make a line."""
        line = super().__new__(cls, text)
        line.tone = tone
        return line


TONES = {"good": "bold green", "bad": "bold red", "head": "bold"}
"""Styles of a terminal, as rich names them."""

Block = str | Table
"""A line of text, or a table."""


def apart(blocks: Iterable[Block]) -> list[Block]:
    """Return blocks with an empty line between two of them."""
    return [line for block in blocks for line in ("", block)][1:]


def text_of(blocks: Iterable[Block]) -> str:
    """Return lines and tables as text, each on lines of its own."""
    return "\n".join(map(str, blocks))


def _html_of(blocks: Iterable[Block]) -> str:
    parts = []
    for is_table, group in groupby(blocks, lambda block: isinstance(block, Table)):
        if is_table:
            parts += [block.as_html() for block in group if isinstance(block, Table)]
        elif lines := "\n".join(map(str, group)).strip("\n"):
            parts.append(f"<pre>{_escaped(lines)}</pre>")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return html.escape(printable(text))


class Printed(ABC):
    """A result that prints as what its command shows, and as the same in a notebook."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Return what the command prints with `--json`."""

    @abstractmethod
    def as_blocks(self) -> Sequence[Block]:
        """Return what the command shows, line by line and table by table."""

    def as_details(self) -> Sequence[Block]:
        """Return what the command shows with `--verbose`."""
        return self.as_blocks()

    def as_text(self) -> str:
        """Return what the command shows."""
        return text_of(self.as_blocks())

    def __str__(self) -> str:
        """Return the text; nothing in it acts on a terminal."""
        return printable(self.as_text())

    def _repr_html_(self) -> str:
        return f'<div class="dllm-convert">{_NOTEBOOK}\n{_html_of(self.as_blocks())}\n</div>'


def measure_cells(value: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Return nats per token, perplexity and tokens of a measurement, as cells."""
    nats, stderr = value["nats_per_token"], value.get("stderr")
    if nats is None:
        return "no number", "no number", value.get("tokens")
    spread = f" ± {stderr:.3f}" if stderr is not None else ""
    # exp overflows a float above 709 nats; such a model has no perplexity worth a number.
    perplexity = f"{math.exp(nats):.4g}" if nats < 700 else "inf"
    return f"{nats:.3f}{spread}", perplexity, value.get("tokens")


def cell_text(value: Any) -> str:
    """Return a value as a cell: a float with four digits, text on one line."""
    if value is None:
        return ""
    # A name with a line end must not begin a row of its own.
    return f"{value:.4g}" if isinstance(value, float) else one_line(str(value))
