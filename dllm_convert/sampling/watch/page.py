"""A film as one HTML page: no other file, no request, played or stepped through by keyboard."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len

from dllm_convert.common import strict_json
from dllm_convert.sampling.watch.cells import Cell, State, caption, cells_of, count_new
from dllm_convert.sampling.watch.frames import Film
from dllm_convert.sampling.watch.pieces import NEWLINE, TokenText

TEMPLATE = "page.html.jinja"
_MASK = "_"
_CODES = {
    State.PROMPT: "p",
    State.WAITING: "l",
    State.MASKED: "m",
    State.DRAFTED: "d",
    State.REJECTED: "x",
}


def render_page(film: Film, text: TokenText, *, title: str) -> str:
    """Return the page of a film.

    Args:
        film: What was recorded.
        text: Texts of tokens.
        title: Heading, such as the name of the checkpoint.
    """
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    frames = [cells_of(film, frame, number, text) for number, frame in enumerate(film.frames)]
    final = frames[-1]
    script = {
        "room": [_room(cell.text) for cell in final],
        "frames": [
            {"say": caption(film, frame), "done": count_new(film, frame), "cells": _changes(a, b)}
            for a, b, frame in zip([(), *frames[:-1]], frames, film.frames, strict=True)
        ],
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = files("dllm_convert.sampling.watch").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title,
        frames=len(frames),
        drafts=any(frame.drafts for frame in film.frames),
        caption=caption(film, film.frames[-1]),
        final=[(_code(cell), cell.text) for cell in final],
        film=_for_script(script),
    )


def _code(cell: Cell) -> str:
    """Return the class of a cell in the page: what it is, or how new."""
    return _CODES.get(cell.state, "h" if cell.held else f"n{cell.age}")


def _room(text: str) -> str:
    """Return the mask of a final text: as wide, with its spaces and line ends."""
    return "".join(
        char if char in f" \n{NEWLINE}" else _MASK * cell_len(char) for char in text
    ) or ("" if text == "" else _MASK)


def _changes(before: tuple[Cell, ...], after: tuple[Cell, ...]) -> list[list[Any]]:
    """Return [number, class, text] of each cell that differs, [number] of each that is gone."""
    changes: list[list[Any]] = []
    for number, cell in enumerate(after):
        if number >= len(before) or before[number] != cell:
            changes.append([number, _code(cell), cell.text])
    return changes + [[number] for number in range(len(after), len(before))]


def _for_script(value: Any) -> str:
    """Return JSON that nothing inside can end the script element of."""
    dumped = strict_json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028"}
    escapes["\u2029"] = "\\u2029"
    return "".join(escapes.get(char, char) for char in dumped)
