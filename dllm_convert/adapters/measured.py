"""A measured adapter as plain values: how config.json and the manifest record it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from dllm_convert.adapters.base import Adapter, Measured, SlidingWindow
from dllm_convert.errors import IncompatibleError

RECORD = "adapter"
"""Key of the `diffusion` section that holds the record."""

_VERSION = re.compile(r"[\w.+-]+")


def adapter_as_dict(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter's fields that are not the defaults, as JSON has them: lists, no tuples."""
    defaults = {field.name: field.default for field in fields(Adapter)}
    given = {key: value for key, value in asdict(adapter).items() if value != defaults[key]}
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain


def adapter_from_dict(record: Mapping[str, Any]) -> Adapter:
    """Read what `adapter_as_dict` wrote; the file may be anybody's.

    Raises:
        IncompatibleError: It is not such a record.
    """
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        measured = dict(values["measured"])
        for key in ("narrow", "order"):
            measured[key] = tuple(measured.get(key, ()))
        counts = [measured["layers"][kind] for kind in sorted(measured["layers"])]
        places: Counter[int] = Counter(measured["order"])
        if places and places != Counter(dict(enumerate(counts))):
            raise ValueError("the order of its layers is not one of its layers")
        values["measured"] = Measured(**measured)
        if values.get("window") is not None:
            values["window"] = SlidingWindow(**values["window"])
        adapter = Adapter(**values)
        # What ends up in generated code is held to be what a measurement writes.
        if not str(adapter.stock_class).isidentifier():
            raise ValueError("stock_class is no name")
        if adapter.diffusion_class != f"Diffusion{adapter.stock_class}":
            raise ValueError("diffusion_class is not that of stock_class")
        versions = (adapter.min_transformers, values["measured"].transformers)
        if not all(_VERSION.fullmatch(str(version)) for version in versions):
            raise ValueError("a version is none")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IncompatibleError(
            f"diffusion.{RECORD} of config.json is no record of a measured family ({error})",
            hint="Convert the model again with this version of dllm-convert",
        ) from error
    return adapter
