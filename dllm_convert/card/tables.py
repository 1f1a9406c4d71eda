"""The numbers behind the pictures as tables: for the report's readers and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dllm_convert.verification.observe.observations import InfluenceMap, Observations, RatePoint

SKETCH = 16
"""Most rows of an influence map on a terminal."""


@dataclass(frozen=True)
class Table:
    """Words and numbers in rows.

    Attributes:
        header: Names of the columns; the first is that of the rows' names.
        rows: As many texts each.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def attention_table(seen: Observations) -> Table | None:
    """How many pairs look ahead, in the base, in the converted model and as it claims."""
    influence = seen.influence
    if influence is None:
        return None
    maps = {"base": influence.base, "converted": influence.converted}
    rows = [(name, *map(_count, map_.ahead)) for name, map_ in maps.items() if map_ is not None]
    claimed = (_count(influence.claimed_ahead), _count(influence.converted.ahead[1]))
    return Table(("pairs that look ahead", "open", "of"), (*rows, ("claimed", *claimed)))


def attention_summary(seen: Observations) -> str | None:
    """Say in a sentence what the influence maps show."""
    influence = seen.influence
    if influence is None:
        return None
    opened, pairs = influence.converted.ahead
    start = f"In the converted model {_count(opened)} of {_count(pairs)} pairs look ahead"
    if influence.base is not None:
        before, of = influence.base.ahead
        start = (
            f"In the base {_count(before)} of {_count(of)} pairs look ahead; "
            f"in the converted model {_count(opened)} do"
        )
    if not influence.opened_as_claimed:
        return f"{start}, not those {_count(influence.claimed_ahead)} that it claims."
    inside = f"exactly those inside a block of {influence.block_size}"
    return f"{start}, {inside if influence.block_size else 'which is all of them'}."


def rates_table(seen: Observations) -> Table | None:
    """Nats per masked token at each mask rate."""
    both = {"before training": seen.rates_before, "after training": seen.rates_after}
    known = {name: points for name, points in both.items() if points}
    if not known:
        return None
    rates = sorted({point.rate for points in known.values() for point in points})
    return Table(
        ("nats per masked token", *(f"{rate:.0%} masked" for rate in rates)),
        tuple((name, *(_at(points, rate) for rate in rates)) for name, points in known.items()),
    )


def _at(points: Sequence[RatePoint], rate: float) -> str:
    point = next((point for point in points if point.rate == rate), None)
    if point is None:
        return ""
    return f"{point.nats:.2f}" + (f" ± {point.stderr:.2f}" if math.isfinite(point.stderr) else "")


def decoding_table(seen: Observations) -> Table | None:
    """Tokens per forward and agreement at each confidence threshold."""
    if not seen.decoding:
        return None
    rows = tuple(
        (
            "one token per forward" if point.threshold is None else f"{point.threshold:g}",
            f"{point.tokens_per_forward:.2f}",
            f"{point.agreement:.0%} of {point.tokens}",
        )
        for point in seen.decoding
    )
    return Table(("confidence threshold", "tokens per forward", "tokens that agree"), rows)


def loss_table(seen: Observations) -> Table | None:
    """Where the training curves begin and end."""
    curves = seen.curves or {}
    rows = tuple(
        (name, *(f"{c.values[i]:.3f} at step {c.steps[i]}" for i in (0, -1)))
        for name, c in curves.items()
    )
    return Table(("nats per token", "first logged", "last logged"), rows) if rows else None


def sketch(seen: Observations) -> str | None:
    """Draw the influence maps with plain characters: `##` sees, `..` does not."""
    influence = seen.influence
    if influence is None:
        return None
    maps = {"base": influence.base, "converted": influence.converted}
    drawn = {name: _sketched(map_) for name, map_ in maps.items() if map_ is not None}
    lines = ["  ".join(name.ljust(len(rows[0])) for name, rows in drawn.items())]
    lines += ["  ".join(row) for row in zip_longest(*drawn.values(), fillvalue="")]
    return "\n".join(line.rstrip() for line in lines)


def _sketched(map_: InfluenceMap) -> list[str]:
    """Make cells of several tokens; those of a block fill whole cells."""
    columns = len(map_.rows[0])
    count = max(n for n in range(1, SKETCH + 1) if columns % n == 0)
    every = columns // count

    def seen(row: int, column: int) -> bool:
        # Of each cell the corner that looks least far ahead.
        position = min((row + 1) * every * map_.stride, map_.length) - 1
        return map_.rows[position][column * every] is not None

    cells = range(count)
    return ["".join("##" if seen(row, column) else ".." for column in cells) for row in cells]


def _count(value: int) -> str:
    return f"{value:,}"
