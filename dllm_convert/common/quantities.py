"""Numbers as people say them: bytes, hours, counts, ranges."""

from __future__ import annotations

from collections.abc import Sequence


def bytes_text(count: float) -> str:
    """Return a number of bytes with a decimal unit, as disks and GPUs are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def rate_text(value: float) -> str:
    """Return so many a second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def hours_text(hours: float) -> str:
    """Return a time in the unit that fits it."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.3g} h" if hours < 1000 else f"{hours:,.0f} h"


def count_text(count: int | None) -> str:
    """Return a number as it is said of models and texts: 494M, 1.3B; empty if there is none."""
    if count is None:
        return ""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def ranges_text(numbers: Sequence[int]) -> str:
    """Return rising numbers as ranges: 0-4, 6, 8-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:7], "..."])
