"""A verification for people, from the report as the manifest holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.common.shown_text import one_line
from dllm_convert.common.tables import cell_text, table

_VERDICTS = {True: "ok", False: "FAILED", None: "skipped"}


def verification_table(verification: Mapping[str, Any]) -> str:
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
    header, *lines = table(("", "probe", "measured", "required"), rows).split("\n")
    shown = [header]
    for line, probe in zip(lines, probes, strict=True):
        shown.append(line)
        if probe["passed"] is False:
            notes = (probe.get("detail"), probe.get("origin"))
            shown += [f"{'':9}{one_line(note)}" for note in notes if note]
    return "\n".join([*shown, "", _tally(verification)])


def _tally(verification: Mapping[str, Any]) -> str:
    """Return how many probes passed, failed and were not run, on one line."""
    verdicts = [probe["passed"] for probe in verification["probes"]]
    passed, failed, unknown = (verdicts.count(verdict) for verdict in (True, False, None))
    seconds = verification.get("seconds")
    took = "" if seconds is None else f" in {seconds:.0f} s"
    return f"{passed} of {len(verdicts)} probes passed, {failed} failed, {unknown} not run{took}"


def failed_probes(verification: Mapping[str, Any]) -> str:
    """Return the failed probes of a report on one line, with what was measured and required."""
    return "; ".join(
        f"{probe['name']}: measured {cell_text(probe.get('measured')) or 'nothing'}, "
        f"required {cell_text(probe.get('required')) or 'to pass'}"
        for probe in verification["probes"]
        if probe["passed"] is False
    )
