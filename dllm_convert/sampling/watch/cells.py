"""One frame as cells: what is shown of each position, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dllm_convert.sampling.watch.frames import UNWRITTEN, Fate, Film, Frame
from dllm_convert.sampling.watch.pieces import TokenText

FRESH = 3
"""Frames for which a new token stands out."""


class State(StrEnum):
    """What a position is, from a reader's point of view."""

    PROMPT = "prompt"
    WAITING = "waiting"
    MASKED = "masked"
    WRITTEN = "written"
    DRAFTED = "drafted"
    REJECTED = "rejected"


UNVERIFIED = frozenset({State.DRAFTED, State.REJECTED})
"""What is shown and not written."""
OPEN = UNVERIFIED | {State.MASKED, State.WAITING}
"""What is not written."""


@dataclass(frozen=True)
class Cell:
    """One position of a frame.

    Attributes:
        text: What is written there, empty where nothing is.
        state: What it is.
        age: Frames since it was written, 0 in the frame that wrote it; counted up to `FRESH`.
        held: Whether it was drafted before, and the verifier wrote the same.
    """

    text: str
    state: State
    age: int = FRESH
    held: bool = False


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
    held = {draft.position for draft in frame.drafts if draft.fate is Fate.HELD}
    unverified: dict[int, State] = {}
    for draft in frame.drafts:
        # What is drafted anew comes behind what was rejected at its position.
        if draft.position < end and written[draft.position] == UNWRITTEN:
            known[draft.position] = draft.token
            is_open = draft.fate is Fate.OPEN
            unverified[draft.position] = State.DRAFTED if is_open else State.REJECTED
    cells = []
    texts = text.texts(known, film.prompt_length)
    for position, (shown, when) in enumerate(zip(texts, written, strict=True)):
        if position in unverified:
            cells.append(Cell(shown, unverified[position]))
        elif when == UNWRITTEN:
            cells.append(Cell("", State.MASKED if position < working else State.WAITING))
        elif position < film.prompt_length and when == 0:
            cells.append(Cell(shown, State.PROMPT))
        else:
            age = min(number - when, FRESH)
            cells.append(Cell(shown, State.WRITTEN, age, position in held))
    return tuple(cells)


def count_new(film: Film, frame: Frame) -> tuple[int, int]:
    """Return how many new tokens of a frame's text are written, and how many it will have."""
    written = frame.written[: film.end(frame)]
    given = sum(when == 0 for when in written)
    return len(written) - given - written.count(UNWRITTEN), len(written) - given


def caption(film: Film, frame: Frame) -> str:
    """Return how far a frame is, in words."""
    done, total = count_new(film, frame)
    said = f"forward {frame.forward}, {done} of {total} tokens"
    held, rejected = (
        sum(draft.fate is fate for draft in frame.drafts) for fate in (Fate.HELD, Fate.REJECTED)
    )
    return f"{said}, {held} of {held + rejected} drafts held" if held + rejected else said


def plain(cells: Sequence[Cell], mask: str) -> str:
    """Return cells as one line of text, `mask` for each position that is not written."""
    return "".join(mask if cell.state in OPEN else cell.text.replace("\n", "") for cell in cells)
