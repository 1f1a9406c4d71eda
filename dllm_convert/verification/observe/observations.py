"""What pictures are drawn from: plain values that the manifest holds, so no model is needed again.

A manifest may come from elsewhere: whatever in it does not fit is taken for not measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BeforeValidator,
    FiniteFloat,
    PositiveInt,
    TypeAdapter,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

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
    stride: PositiveInt

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

    @model_serializer
    def _written(self) -> dict[str, Any]:
        """Write a row as a line of tenths of log10."""
        return {
            "stride": self.stride,
            "rows": [
                " ".join(CLOSED if v is None else str(round(v * _DECIBELS)) for v in row)
                for row in self.rows
            ],
        }

    @field_validator("rows", mode="before")
    @classmethod
    def _read(cls, rows: Any) -> Any:
        if not isinstance(rows, list):
            return rows
        return [
            [None if word == CLOSED else int(word) / _DECIBELS for word in row.split()]
            if isinstance(row, str)
            else row
            for row in rows
        ]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if {len(row) for row in self.rows} != {-(-len(self.rows) // self.stride)}:
            raise ValueError("rows do not fit")
        return self


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
    block_size: PositiveInt | None

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


@dataclass(frozen=True)
class RatePoint:
    """What masked tokens cost where a fixed share of the text is masked.

    Attributes:
        rate: Share of the tokens that are masked.
        nats: Nats per masked token. Its mean over all rates is the NELBO.
        stderr: Standard error over sequences, infinite if there was one only.
        tokens: Masked tokens.
    """

    rate: FiniteFloat
    nats: FiniteFloat
    # JSON has no infinity.
    stderr: Annotated[float, BeforeValidator(lambda v: math.inf if v is None else v)]
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

    threshold: FiniteFloat | None
    tokens_per_forward: FiniteFloat
    agreement: FiniteFloat
    tokens: int


@dataclasses.dataclass(frozen=True)
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
            "influence": TypeAdapter(Influence | None).dump_python(self.influence),
            "mask_rates": {
                name: [dataclasses.asdict(point) for point in points]
                for name, points in (("before", self.rates_before), ("after", self.rates_after))
                if points
            },
            "decoding": [dataclasses.asdict(point) for point in self.decoding],
            "curves": {
                name: TypeAdapter(Curve).dump_python(curve, mode="json")
                for name, curve in (self.curves or {}).items()
            },
        }
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_measurements(cls, measurements: Mapping[str, Any]) -> Observations:
        """Read them from the manifest's `measurements`."""
        rates = measurements.get("mask_rates") or {}
        return cls(
            _read(Influence, measurements.get("influence")),
            _read(tuple[RatePoint, ...], _entry(rates, "before")) or (),
            _read(tuple[RatePoint, ...], _entry(rates, "after")) or (),
            _read(tuple[DecodingPoint, ...], measurements.get("decoding")) or (),
            {
                name: curve
                for name in ("loss", "nelbo")
                if (curve := _read(Curve, _entry(measurements.get("curves"), name)))
            },
            _held_out(measurements),
        )


def _entry(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _read(kind: type[T], value: Any) -> T | None:
    """Return what a manifest holds, None where it is nothing or something else."""
    if not value:
        return None
    try:
        return TypeAdapter(kind).validate_python(value)
    except (ArithmeticError, ValueError):
        return None


def _held_out(measurements: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for key in ("nelbo_before", "nelbo_after", "ar_nll"):
        nats = _entry(measurements.get(key), "nats_per_token")
        if is_number(nats):
            found[key] = float(nats)
    return found
