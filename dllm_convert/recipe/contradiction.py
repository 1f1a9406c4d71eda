"""Fields of a recipe that do not go together, as a value and as what the schema raises."""

from __future__ import annotations

from dataclasses import dataclass


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


class UnsoundError(ValueError):
    """A recipe whose fields contradict each other, as the schema raises it.

    Args:
        found: The first contradiction.
    """

    def __init__(self, found: Contradiction) -> None:
        super().__init__(found.message)
        self.found = found
