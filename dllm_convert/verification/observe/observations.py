"""What pictures are drawn from: plain values that the manifest holds, so no model is needed again.

A manifest may come from elsewhere: whatever in it does not fit is taken for not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dllm_convert.verification.observe.logged import Curve, is_number

CLOSED = "."
_DECIBELS = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class InfluenceMap:
    """How far the logits at each position move when one token is changed.

    Attributes:
        rows: Per position, per changed token: the largest change of a logit there, as log10 of its
            share of the text's largest logit; None where nothing moved.
        stride: Every so many tokens one was changed, from token 0 on.
    """

    rows: tuple[tuple[float | None, ...], ...]
    stride: int

    @property
    def length(self) -> int:
        """Positions of the text."""
        return len(self.rows)

    @property
    def ahead(self) -> tuple[int, int]:
        """Of the pairs whose token stands after the position: how many are open, and how many."""
        pairs = self.pairs_ahead()
        return sum(value is not None for *_, value in pairs), len(pairs)

    def pairs_ahead(self) -> list[tuple[int, int, float | None]]:
        """Return position, later token and what `rows` say of them."""
        return [
            (position, column * self.stride, value)
            for position, row in enumerate(self.rows)
            for column, value in enumerate(row)
            if column * self.stride > position
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for the manifest; a row is a line of tenths of log10."""
        return {"stride": self.stride, "rows": [_written(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> InfluenceMap:
        """Read what `as_dict` wrote.

        Raises:
            ValueError: It is something else.
        """
        rows = tuple(_read(str(row)) for row in value["rows"])
        stride = int(value["stride"])
        widths = {len(row) for row in rows}
        if stride < 1 or len(widths) != 1 or widths != {-(-len(rows) // stride)}:
            raise ValueError("rows do not fit")
        return cls(rows, stride)


def _written(row: Sequence[float | None]) -> str:
    return " ".join(CLOSED if v is None else str(round(v * _DECIBELS)) for v in row)


def _read(line: str) -> tuple[float | None, ...]:
    return tuple(None if word == CLOSED else int(word) / _DECIBELS for word in line.split())


@dataclass(frozen=True)
class Influence:
    """The same text in the base and in the converted model.

    Attributes:
        converted: Of the converted model.
        base: Of the base, None if it was not at hand.
        block_size: Tokens per block, None for mdlm.
    """

    converted: InfluenceMap
    base: InfluenceMap | None
    block_size: int | None

    @property
    def claimed_ahead(self) -> int:
        """How many pairs that look ahead the converted model claims to be open."""
        return sum(self._claims(*pair[:2]) for pair in self.converted.pairs_ahead())

    @property
    def opened_as_claimed(self) -> bool:
        """Whether of the pairs that look ahead exactly those are open that it claims."""
        return all(
            self._claims(position, token) == (value is not None)
            for position, token, value in self.converted.pairs_ahead()
        )

    def _claims(self, position: int, token: int) -> bool:
        size = self.block_size or self.converted.length
        return token // size == position // size

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        base = self.base.as_dict() if self.base else None
        return {
            "converted": self.converted.as_dict(),
            "base": base,
            "block_size": self.block_size,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Influence:
        """Read what `as_dict` wrote.

        Raises:
            ValueError: It is something else.
        """
        block = value["block_size"]
        if block is not None and not (isinstance(block, int) and block > 0):
            raise ValueError("no block size")
        base = InfluenceMap.from_dict(value["base"]) if value["base"] else None
        return cls(InfluenceMap.from_dict(value["converted"]), base, block)


@dataclass(frozen=True)
class RatePoint:
    """What masked tokens cost where a fixed share of the text is masked.

    Attributes:
        rate: Share of the tokens that are masked.
        nats: Nats per masked token. Its mean over all rates is the NELBO.
        stderr: Standard error over sequences, infinite if there was one only.
        tokens: Masked tokens.
    """

    rate: float
    nats: float
    stderr: float
    tokens: int


@dataclass(frozen=True)
class DecodingPoint:
    """How fast and how faithfully text is decoded.

    Attributes:
        threshold: Confidence from which tokens become final; None: one token per forward.
        tokens_per_forward: New tokens over forward passes, those that read the prompt included.
        agreement: Share of the new tokens that are those of one token per forward.
        tokens: New tokens.
    """

    threshold: float | None
    tokens_per_forward: float
    agreement: float
    tokens: int


@dataclass(frozen=True)
class Observations:
    """Everything that pictures are drawn from; what was not measured is None or empty.

    Attributes:
        influence: Who sees whom.
        rates_before: Per mask rate, before training.
        rates_after: Per mask rate, after training.
        decoding: Per confidence threshold, one token per forward first.
        curves: `loss` and `nelbo` of the training.
        held_out: Nats per token of `nelbo_before`, `nelbo_after` and `ar_nll`.
    """

    influence: Influence | None = None
    rates_before: tuple[RatePoint, ...] = ()
    rates_after: tuple[RatePoint, ...] = ()
    decoding: tuple[DecodingPoint, ...] = ()
    curves: Mapping[str, Curve] | None = None
    held_out: Mapping[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest's `measurements` hold of it; what is empty is left out."""
        values = {
            "influence": self.influence.as_dict() if self.influence else None,
            "mask_rates": {
                name: [vars(point) for point in points]
                for name, points in (("before", self.rates_before), ("after", self.rates_after))
                if points
            },
            "decoding": [vars(point) for point in self.decoding],
            "curves": {
                name: {"steps": list(curve.steps), "values": list(curve.values)}
                for name, curve in (self.curves or {}).items()
            },
        }
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_measurements(cls, measurements: Mapping[str, Any]) -> Observations:
        """Read them from the manifest's `measurements`."""
        rates = measurements.get("mask_rates") or {}
        return cls(
            _try(Influence.from_dict, measurements.get("influence")),
            _try(lambda v: _points(v, RatePoint), _entry(rates, "before")) or (),
            _try(lambda v: _points(v, RatePoint), _entry(rates, "after")) or (),
            _try(lambda v: _points(v, DecodingPoint), measurements.get("decoding")) or (),
            _try(_curves, measurements.get("curves")),
            _held_out(measurements),
        )


def _entry(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _try(read: Callable[[Any], T], value: Any) -> T | None:
    if not value:
        return None
    try:
        return read(value)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _points(values: Any, kind: Callable[..., T]) -> tuple[T, ...]:
    points = [{str(k): None if v is None else float(v) for k, v in p.items()} for p in values]
    for point in points:
        drawn = (v for k, v in point.items() if k != "stderr" and (k, v) != ("threshold", None))
        if not all(map(is_number, drawn)):
            raise ValueError("a point that cannot be drawn")
        if "stderr" in point and point["stderr"] is None:
            point["stderr"] = math.inf
    return tuple(kind(**{**point, "tokens": int(point["tokens"] or 0)}) for point in points)


def _curves(values: Any) -> dict[str, Curve]:
    return {
        name: Curve(
            tuple(int(step) for step in values[name]["steps"]),
            tuple(float(value) for value in values[name]["values"]),
        )
        for name in ("loss", "nelbo")
        if name in values
        and len(values[name]["steps"]) == len(values[name]["values"]) > 1
        and all(map(is_number, values[name]["values"]))
    }


def _held_out(measurements: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for key in ("nelbo_before", "nelbo_after", "ar_nll"):
        nats = _entry(measurements.get(key), "nats_per_token")
        if is_number(nats):
            found[key] = float(nats)
    return found
