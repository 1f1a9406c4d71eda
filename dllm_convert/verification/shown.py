"""A verification for people, from the report as the manifest holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.common.tables import Block, Table, cell_text

_VERDICTS = {True: "ok", False: "FAILED", None: "skipped"}


def verification_blocks(verification: Mapping[str, Any]) -> list[Block]:
    """Return the probes of a report, one line each, and what they come to.

    Below a failed probe stands the first thing that is wrong, and why its tolerance is what it is.

    Args:
        verification: `passed`, and `probes` of `name`, `passed` (None if the probe was not run),
            `measured`, `required`, `detail` and `origin`; `seconds` if it was timed.
    """
    probes = verification["probes"]
    rows = [
        (_VERDICTS[probe["passed"]], probe["name"], probe.get("detail"), "")
        if probe["passed"] is None
        else (
            _VERDICTS[probe["passed"]],
            probe["name"],
            probe.get("measured"),
            probe.get("required"),
        )
        for probe in probes
    ]
    notes = {
        number: [note for note in (probe.get("detail"), probe.get("origin")) if note]
        for number, probe in enumerate(probes)
        if probe["passed"] is False
    }
    return [Table(("", "probe", "measured", "required"), rows, notes), "", tally(verification)]


def tally(verification: Mapping[str, Any]) -> str:
    """Return how many probes passed, failed and were not run, on one line."""
    verdicts = [probe["passed"] for probe in verification["probes"]]
    passed, failed, unknown = (verdicts.count(verdict) for verdict in (True, False, None))
    seconds = verification.get("seconds")
    took = "" if seconds is None else f" in {seconds:.0f} s"
    return f"{passed} of {len(verdicts)} probes passed, {failed} failed, {unknown} not run{took}"


def failures(verification: Mapping[str, Any]) -> list[str]:
    """Return a line for each failed probe of a report, with what was measured and required."""
    return [
        f"{probe['name']}: measured {cell_text(probe.get('measured')) or 'nothing'}, "
        f"required {cell_text(probe.get('required')) or 'to pass'}"
        for probe in verification["probes"]
        if probe["passed"] is False
    ]


def failed_probes(verification: Mapping[str, Any]) -> str:
    """Return the failed probes of a report on one line, with what was measured and required."""
    return "; ".join(failures(verification))
