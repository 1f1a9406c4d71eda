"""Fields of a recipe that do not go together, as a value and as what the schema raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Rule = tuple[str, bool, str, str]
"""A field, whether it clashes with another one, why, and what to change."""


@dataclass(frozen=True)
class Contradiction:
    """Fields that do not go together.

    Attributes:
        message: What is wrong, one sentence without a final full stop.
        hint: What to change.
        fields: Dotted fields that say so.
    """

    message: str
    hint: str
    fields: tuple[str, ...]


def clashes(field: str, rules: Iterable[Rule]) -> Iterator[Contradiction]:
    """Yield the fields that do not go together with another one.

    Args:
        field: The other one, as it is typed; what follows a `=` is its value.
        rules: Of each field, whether and why.
    """
    for name, found, why, hint in rules:
        if found:
            yield Contradiction(
                f"{field} and {name} do not go together: {why}",
                hint,
                (field.partition("=")[0], name),
            )


def idle(section: Any, field: str, switch: str, example: float) -> Iterator[Contradiction]:
    """Yield the fields of a section that do nothing, because the one that turns it on is 0.

    Args:
        section: The section.
        field: Its dotted name.
        switch: The field that turns it on.
        example: What that could be.
    """
    for name in sorted(section.model_fields_set - {switch}):
        if getattr(section, name) != type(section).model_fields[name].default:
            yield Contradiction(
                f"{field}.{name} does nothing while {field}.{switch} is 0",
                f"--set {field}.{switch}={example}, for instance",
                (f"{field}.{switch}", f"{field}.{name}"),
            )


class UnsoundError(ValueError):
    """A recipe whose fields contradict each other, as the schema raises it.

    Args:
        found: The first contradiction.
    """

    def __init__(self, found: Contradiction) -> None:
        super().__init__(found.message)
        self.found = found
