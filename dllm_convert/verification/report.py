"""What verification returns: probes, each with the number measured and the number required."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dllm_convert.common.tables import Block, Printed
from dllm_convert.verification.shown import verification_blocks

if TYPE_CHECKING:
    from torch import Tensor


BY_FILES = frozenset({"weights", "mask-row", "base-tensors", "hashes"})
"""Probes that a verification without the model runs, see `verify/bytes.py`."""


NOTHING = "nothing was compared"


@dataclass(frozen=True)
class Probe:
    """One question put to a checkpoint.

    Attributes:
        name: Short name, the same in every report.
        passed: Whether the answer is as required; None if the question was not asked.
        measured: What was found, with its number.
        required: What had to be found.
        detail: The first thing that is wrong, or why the probe was skipped; may be empty.
        origin: Where the number required comes from, see `catalogue.py`.
    """

    name: str
    passed: bool | None
    measured: str
    required: str
    detail: str = ""
    origin: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return asdict(self)


def skipped(name: str, required: str, reason: str) -> Probe:
    """Return a probe that was not run."""
    return Probe(name, None, "not measured", required, reason)


def files_only(verification: Mapping[str, Any] | None) -> bool:
    """Whether a verification passed that never ran the model.

    Args:
        verification: A report as the manifest holds it, None if there is none.
    """
    if not verification or verification.get("passed") is not True:
        return False
    probes = verification.get("probes") or ()
    return not any(p["passed"] is not None and p["name"] not in BY_FILES for p in probes)


@dataclass(frozen=True)
class VerificationReport(Printed):
    """All probes of one verification.

    Attributes:
        probes: In the order they ran.
        seconds: Wall time.
        groups: Wall time of each group of probes that ran, in seconds.
    """

    probes: tuple[Probe, ...]
    seconds: float
    groups: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether some probe passed and none failed; a skipped one is neither."""
        return not self.failed and any(probe.passed for probe in self.probes)

    @property
    def failed(self) -> tuple[Probe, ...]:
        """The probes that failed."""
        return tuple(probe for probe in self.probes if probe.passed is False)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as the manifest holds it."""
        return {
            "passed": self.passed,
            "probes": [probe.as_dict() for probe in self.probes],
            "seconds": self.seconds,
            "groups": dict(self.groups),
        }

    @classmethod
    def from_dict(cls, verification: Mapping[str, Any]) -> VerificationReport:
        """Read a report as the manifest holds it."""
        names = [item.name for item in fields(Probe)]
        probes = (
            Probe(**{name: probe[name] for name in names if name in probe})
            for probe in verification["probes"]
        )
        seconds, groups = verification.get("seconds", 0.0), verification.get("groups", {})
        return cls(tuple(probes), seconds, groups)

    def as_blocks(self) -> list[Block]:
        """Return the probes, one line each, and what they come to."""
        return verification_blocks(self.as_dict())


def at_most(name: str, what: str, measured: float, limit: float, *, detail: str = "") -> Probe:
    """Return a probe that passes if `measured <= limit`; not-a-number, which is nothing, fails.

    Args:
        name: Name of the probe.
        what: What was measured, such as `logits differ by`.
        measured: The number.
        limit: The largest that is allowed.
        detail: Printed with the probe.
    """
    passed = measured <= limit
    said = NOTHING if math.isnan(measured) else f"{what} {measured:.3g}"
    return Probe(name, passed, said, f"at most {limit:.3g}", detail)


def largest(differences: Sequence[Tensor]) -> float:
    """Return the largest absolute value in any of the tensors; not-a-number counts as infinite.

    Of nothing it is not a number, which is below no limit: what compared nothing did not pass.
    """
    values = (difference.abs().max() for difference in differences if difference.numel())
    return max((float(v) if not v.isnan() else math.inf for v in values), default=math.nan)


def none_wrong(wrong: int, of: int) -> bool:
    """Whether there was something to look at, and none of it was wrong."""
    return of > 0 and not wrong


def first_items(items: Mapping[str, str] | list[str], limit: int = 3) -> str:
    """Join the first few entries for a `detail`, saying how many more there are."""
    texts = [f"{k} {v}" for k, v in items.items()] if isinstance(items, Mapping) else items
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + more
