"""What the stages of a run hand each other, and what the journal remembers of it.

Each is a frozen value; the journal holds its fields as JSON, so a run that goes on has what an
earlier session found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from dllm_convert.errors import DataError

Section = Mapping[str, Any]
"""A part of the manifest as it stands there."""


@dataclass(frozen=True)
class StageResult:
    """What a stage found; its fields are those of the journal and of the manifest."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for the journal; what was not measured is left out."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: Path) -> Self:
        """Read what `as_dict` gave.

        Args:
            record: What a stage recorded.
            where: The journal, for the message.

        Raises:
            DataError: The fields are others: another version of the program wrote them.
        """
        known = {entry.name for entry in fields(cls)}
        needed = {
            entry.name
            for entry in fields(cls)
            if entry.default is MISSING and entry.default_factory is MISSING
        }
        if not needed <= record.keys() <= known:
            raise DataError(
                f"{where} was written by another version of dllm-convert, which recorded other "
                "things of its stages",
                hint=f"Finish the run with that version, or remove {where.parent} to begin anew",
            )
        return cls(**record)


@dataclass(frozen=True)
class Done(StageResult):
    """A stage whose result lies in the folder."""


@dataclass(frozen=True)
class Fetched(StageResult):
    """Stage `materialise`.

    Attributes:
        folder: The source as safetensors, config and tokenizer.
    """

    folder: str


@dataclass(frozen=True)
class Adapted(StageResult):
    """Stage `adapt`: the untrained conversion.

    Attributes:
        tensors_changed: Names of tensors that are not the base's, byte for byte.
        source_files: SHA-256 of each file of the source.
        files: SHA-256 of each file that was written.
        ways: Name of a weight file to how it came about: copied, linked, rewritten.
    """

    tensors_changed: list[str] = field(default_factory=list)
    source_files: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    ways: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline(StageResult):
    """Stage `baseline`: what the untrained conversion and its base show.

    Attributes:
        data: Counts of the text.
        nelbo_before: NELBO of the untrained conversion on held-out text.
        start: Fields of `training.expectation.Start`.
        ar_nll: The base's own NLL on the same tokens, where it has one.
    """

    data: Section
    nelbo_before: Section
    start: Section
    ar_nll: Section | None = None


@dataclass(frozen=True)
class Measured(StageResult):
    """Stage `measure`.

    Attributes:
        nelbo_after: NELBO of the trained conversion on the same text.
    """

    nelbo_after: Section


@dataclass(frozen=True)
class Verified(StageResult):
    """Stage `verify`: a `VerificationReport` as the manifest holds it.

    Attributes:
        passed: Whether some probe passed and none failed.
        probes: Fields of each probe.
        seconds: Wall time.
        groups: Wall time of each group of probes, in seconds.
    """

    passed: bool
    probes: list[Section]
    seconds: float
    groups: Mapping[str, float]

    @property
    def failed(self) -> str:
        """Names of the probes that failed, on one line."""
        return ", ".join(probe["name"] for probe in self.probes if probe["passed"] is False)


@dataclass(frozen=True)
class Recorded(StageResult):
    """A section of the manifest that another room gives its form.

    Attributes:
        section: The section.
    """

    section: Section

    def as_dict(self) -> dict[str, Any]:
        """Return the section."""
        return dict(self.section)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: Path) -> Self:
        """Take the section."""
        return cls(record)
