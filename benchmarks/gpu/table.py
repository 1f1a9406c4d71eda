"""What was found: a line a check, on the terminal and in results.json, as soon as it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dllm_convert.common.tables import Table

Verdict = Literal["ok", "FAIL", "slow", "info"]
CORRECTNESS = "correctness"


@dataclass(frozen=True)
class Line:
    """One check.

    Attributes:
        group: Phase it belongs to.
        what: What was measured.
        measured: The figure, or a few words.
        unit: Of the figure.
        goal: What was wanted, in words; empty where nothing was.
        verdict: `FAIL` of what is wrong or broke, `slow` of a figure that misses its goal.
    """

    group: str
    what: str
    measured: float | int | str
    unit: str
    goal: str
    verdict: Verdict


class Results:
    """All lines so far; those of another process that wrote the same file are kept.

    Args:
        path: results.json; written anew after each line.
        facts: What it was measured on and with.
        judges_speed: Whether the goals are those of this device.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *, judges_speed: bool) -> None:
        self._path, self._facts, self._judges = path, dict(facts), judges_speed
        self.lines: list[Line] = []
        if path.exists():
            self.lines = [Line(**line) for line in json.loads(path.read_text())["lines"]]

    def add(
        self,
        group: str,
        what: str,
        measured: float | int | str,
        unit: str = "",
        *,
        goal: str = "",
        ok: bool | None = None,
    ) -> None:
        """Add a line; `ok` is whether the goal is reached, None where there is none."""
        is_right = group == CORRECTNESS
        verdict: Verdict = "info"
        if ok is not None and (is_right or self._judges):
            verdict = "ok" if ok else "FAIL" if is_right else "slow"
        self._append(Line(group, what, measured, unit, goal, verdict))

    def broke(self, group: str, what: str, reason: str) -> None:
        """Add the line of a check that came to no figure."""
        shown = " ".join(reason.split())[:120]
        self._append(Line(group, what, shown, "", "a figure", "FAIL"))

    def left_out(self, group: str, what: str, reason: str) -> None:
        """Add the line of a check that was not run; of correctness nothing may be left unknown."""
        verdict: Verdict = "FAIL" if group == CORRECTNESS else "info"
        self._append(Line(group, what, f"not run: {reason}", "", "", verdict))

    def _append(self, line: Line) -> None:
        self.lines.append(line)
        shown = _shown(line)
        goal = f"  (goal {line.goal})" if line.goal else ""
        print(f"{line.verdict:5}{line.group}: {line.what}: {shown}{goal}", flush=True)
        document = {**self._facts, "lines": [asdict(each) for each in self.lines]}
        # Whole or not at all: whoever stops this process finds the lines before.
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(self._path)

    @property
    def failed(self) -> bool:
        """Whether something is wrong, or broke."""
        return any(line.verdict == "FAIL" for line in self.lines)

    def table(self) -> str:
        """Return all lines, aligned."""
        rows = [
            (line.verdict, line.group, line.what, _shown(line), line.goal) for line in self.lines
        ]
        return str(Table(("", "group", "what", "measured", "goal"), rows))


def _shown(line: Line) -> str:
    figure = f"{line.measured:,.4g}" if isinstance(line.measured, float) else str(line.measured)
    if isinstance(line.measured, float) and abs(line.measured) >= 1000:
        figure = f"{line.measured:,.0f}"
    return f"{figure} {line.unit}".strip()


def now() -> str:
    """The time, for the head of results.json."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
