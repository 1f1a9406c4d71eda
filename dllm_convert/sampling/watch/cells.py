"""One frame as cells: what is shown of each position, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dllm_convert.sampling.watch.frames import UNWRITTEN, Film, Frame
from dllm_convert.sampling.watch.pieces import TokenText

FRESH = 3
"""Frames for which a new token stands out."""


class State(StrEnum):
    """What a position is, from a reader's point of view."""

    PROMPT = "prompt"
    WAITING = "waiting"
    MASKED = "masked"
    WRITTEN = "written"


@dataclass(frozen=True)
class Cell:
    """One position of a frame.

    Attributes:
        text: What is written there, empty where nothing is.
        state: What it is.
        age: Frames since it was written, 0 in the frame that wrote it; counted up to `FRESH`.
    """

    text: str
    state: State
    age: int = FRESH


def cells_of(film: Film, frame: Frame, number: int, text: TokenText) -> tuple[Cell, ...]:
    """Return the cells of a frame, up to its first new end-of-text token.

    Args:
        film: What the frame belongs to.
        frame: The frame.
        number: Its number in the film.
        text: Texts of tokens.
    """
    end, working = film.end(frame), film.working(frame)
    written = frame.written[:end]
    known = [
        None if when == UNWRITTEN else token
        for token, when in zip(frame.tokens[:end], written, strict=True)
    ]
    cells = []
    texts = text.texts(known, film.prompt_length)
    for position, (shown, when) in enumerate(zip(texts, written, strict=True)):
        if when == UNWRITTEN:
            cells.append(Cell("", State.MASKED if position < working else State.WAITING))
        elif position < film.prompt_length and when == 0:
            cells.append(Cell(shown, State.PROMPT))
        else:
            cells.append(Cell(shown, State.WRITTEN, min(number - when, FRESH)))
    return tuple(cells)


def count_new(film: Film, frame: Frame) -> tuple[int, int]:
    """Return how many new tokens of a frame's text are written, and how many it will have."""
    written = frame.written[: film.end(frame)]
    given = sum(when == 0 for when in written)
    return len(written) - given - written.count(UNWRITTEN), len(written) - given


def caption(film: Film, frame: Frame) -> str:
    """Return how far a frame is, in words."""
    done, total = count_new(film, frame)
    return f"forward {frame.forward}, {done} of {total} tokens"


def plain(cells: Sequence[Cell], mask: str) -> str:
    """Return cells as one line of text, `mask` for each position that is not written."""
    return "".join(
        mask if cell.state in (State.MASKED, State.WAITING) else cell.text.replace("\n", "")
        for cell in cells
    )
