"""What an option takes: a path that names something, and numbers that can be meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from dllm_convert.common.counts import LARGEST_COUNT, LARGEST_SEED


def named(text: str) -> str:
    """Return a name, a path or an id, as it was typed.

    Raises:
        typer.BadParameter: It is empty, as what an unset variable of a shell leaves.
    """
    if not text.strip():
        raise typer.BadParameter(f"{text!r} names nothing; give a name, or leave the option out.")
    return text


def path_of(text: str) -> Path:
    """Return a path; an empty one would be the folder one stands in.

    Raises:
        typer.BadParameter: It is empty.
    """
    return Path(named(str(text)))


def count(text: str | int) -> int:
    """Return a whole number of at least 1.

    Raises:
        typer.BadParameter: It is none, or larger than can be meant.
    """
    return _whole(text, 1, LARGEST_COUNT)


def count_from_zero(text: str | int) -> int:
    """Return a whole number of at least 0.

    Raises:
        typer.BadParameter: It is none, or larger than can be meant.
    """
    return _whole(text, 0, LARGEST_COUNT)


def seed_of(text: str | int) -> int:
    """Return a seed.

    Raises:
        typer.BadParameter: It is none.
    """
    return _whole(text, 0, LARGEST_SEED)


def port_of(text: str | int) -> int:
    """Return a port to listen at; 0 takes a free one.

    Raises:
        typer.BadParameter: It is none.
    """
    return _whole(text, 0, 65_535)


def offering(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what a shell asks for the names that begin as what was typed (`one_of` has none)."""
    known = [str(name) for name in names]

    def begun(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return begun


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Return what reads one of some names; the error for another one says which is near."""
    known = tuple(names)

    def read(text: str) -> str:
        if text in known:
            return text
        near = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.4)
        asked = f" Did you mean {near[0]}?" if near else ""
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise typer.BadParameter(f"{shown!r} is none of {', '.join(known)}.{asked}")

    return read


def _whole(text: str | int, lowest: int, largest: int) -> int:
    try:
        # Python reads no number of thousands of digits; a shorter one is compared.
        value = int(text)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= largest:
        shown = text if len(str(text)) <= 40 else f"{str(text)[:40]}…"
        raise typer.BadParameter(f"{shown!r} is no whole number from {lowest} to {largest:,}.")
    return value
