"""Errors a user can meet, each with the exit code of the command line.

DllmConvertError (1)
├── UnsupportedError (3)    this family, format or combination has no conversion
├── IncompatibleError (3)   this checkpoint or recipe cannot be converted as asked
├── VerificationError (4)   the converted checkpoint failed a probe
├── DataError (1)           training text or a file on disk is missing, broken or too short
│   ├── UnknownSourceError (2) nothing is where the source that was named should be
│   └── UnknownTaskError (2)   no task of an evaluation has the name that was typed
├── HubError (1)            the Hub refused, is unreachable, or does not have what was named
├── RequestError (2)       what was asked contradicts itself or would change nothing
└── OutputError (1)         the result could not be written to stdout; the work is done
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

_NAME = re.compile(r"`([a-z][a-z_]*(?:=\w+)?)`")


def spelt(text: str, spell: Callable[[str], str]) -> str:
    """Return a message with the names in it as its reader types them.

    What is wrong with a request is found below both doors, the command line and Python; it is
    written with the names of arguments in backquotes, and each door spells those as it has them.

    Args:
        text: A message, names in backquotes.
        spell: From a name, or `name=value`, to what is typed.
    """
    return _NAME.sub(lambda found: spell(found[1]), text)


def names_in(text: str) -> tuple[str, ...]:
    """Return the names in a message, in order."""
    return tuple(dict.fromkeys(_NAME.findall(text)))


class DllmConvertError(Exception):
    """A known failure, reported as one line.

    Args:
        message: What was found and what was expected, one sentence without a final full stop.
        hint: What to type or change next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message and the hint on one line."""
        return f"{self.message}. {self.hint}" if self.hint else self.message


class UnsupportedError(DllmConvertError):
    """A family, file format or combination that has no conversion."""

    exit_code = 3


class IncompatibleError(DllmConvertError):
    """A checkpoint or recipe that cannot be converted as asked."""

    exit_code = 3


class TypedFieldError(IncompatibleError):
    """A recipe, preset or field that was typed: there is none, no such value, or no such pair."""

    exit_code = 2


class VerificationError(DllmConvertError):
    """A converted checkpoint that failed a probe."""

    exit_code = 4


class DataError(DllmConvertError):
    """Text or files that are missing, broken, foreign or too short."""


class UnknownSourceError(DataError):
    """Nothing is where the source that was named should be."""

    exit_code = 2


class UnknownTaskError(DataError):
    """No task of an evaluation has the name that was typed."""

    exit_code = 2


class HubError(DllmConvertError):
    """The Hub refused, is unreachable, or does not have what was named."""


class RequestError(DllmConvertError):
    """What was asked for contradicts itself, is no value that can be meant, or changes nothing.

    Args:
        message: What was found and what was expected; arguments in backquotes, as Python has them
            (see `spelt`).
        hint: What to type instead.
        argument: Argument that said it, None for several.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, hint: str | None = None, argument: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.argument = argument


class OutputError(DllmConvertError):
    """The result could not be written to stdout; what the command did is done."""
