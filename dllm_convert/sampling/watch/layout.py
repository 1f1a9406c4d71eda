"""Lines of a width in columns, as terminals count them, out of the texts of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from dllm_convert.sampling.watch.pieces import NEWLINE


@dataclass(frozen=True)
class Segment:
    """A part of a cell's text on one line.

    Attributes:
        cell: Number of the cell.
        text: The part.
        column: Where it begins.
        width: Columns it takes.
    """

    cell: int
    text: str
    column: int
    width: int


Line = tuple[Segment, ...]


@dataclass(frozen=True)
class _Glyph:
    cell: int
    text: str
    width: int


def wrap(texts: Sequence[str], columns: int) -> tuple[Line, ...]:
    """Break the texts of cells, one after the other, into lines.

    Lines break behind line ends and spaces, and inside words that are longer than a line; a space
    that no longer fits takes no room. Line ends that follow each other share a line: an
    undertrained model writes many.

    Args:
        texts: Text of each cell.
        columns: Width of a line, at least 2: some characters take two columns.
    """
    lines: list[list[_Glyph]] = [[]]
    for glyph in _glyphs(texts):
        line = lines[-1]
        if glyph.text == "\n":
            if any(other.text not in (NEWLINE, " ") for other in line):
                lines.append([])
            continue
        if line and _width(line) + glyph.width > columns:
            if glyph.text == " ":
                line.append(_Glyph(glyph.cell, " ", 0))
                continue
            lines.append(_carried(line))
            if _width(lines[-1]) + glyph.width > columns:
                lines.append([])
        lines[-1].append(glyph)
    return tuple(_line(line) for line in lines if line)


def _width(glyphs: Sequence[_Glyph]) -> int:
    return sum(glyph.width for glyph in glyphs)


def _carried(line: list[_Glyph]) -> list[_Glyph]:
    """Take the beginning of a word off the end of a full line."""
    start = max((number for number, g in enumerate(line, 1) if g.text == " "), default=0)
    if not 0 < start < len(line):
        return []
    carried = line[start:]
    del line[start:]
    return carried


def _glyphs(texts: Sequence[str]) -> list[_Glyph]:
    """Split into characters, each with the accents that follow it."""
    found: list[_Glyph] = []
    for cell, text in enumerate(texts):
        for char in text:
            width = 0 if char == "\n" else cell_len(char)
            if width == 0 and char != "\n" and found and found[-1].text != "\n":
                last = found[-1]
                found[-1] = _Glyph(last.cell, last.text + char, last.width)
            else:
                found.append(_Glyph(cell, char, width))
    return found


def _line(glyphs: Sequence[_Glyph]) -> Line:
    segments: list[Segment] = []
    column = 0
    for glyph in glyphs:
        if segments and segments[-1].cell == glyph.cell:
            last = segments.pop()
            text, width = last.text + glyph.text, last.width + glyph.width
            segments.append(Segment(glyph.cell, text, last.column, width))
        else:
            segments.append(Segment(glyph.cell, glyph.text, column, glyph.width))
        column += glyph.width
    return tuple(segments)
