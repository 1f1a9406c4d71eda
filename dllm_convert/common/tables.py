"""Tables and other text for people, and how a result shows itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dllm_convert.common.shown_text import one_line, printable


class Printed(ABC):
    """A result that prints as what its command shows, and as the same in a notebook."""

    @abstractmethod
    def as_text(self) -> str:
        """Return what the command shows."""

    def __str__(self) -> str:
        """Return the text; nothing in it acts on a terminal."""
        return printable(self.as_text())

    def _repr_html_(self) -> str:
        import html

        return f'<pre style="white-space: pre">{html.escape(str(self))}</pre>'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return aligned columns; the last one is as wide as it needs."""
    cells = [list(header), *([cell_text(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


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
