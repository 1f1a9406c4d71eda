"""Which fields of two recipes differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dllm_convert.common import strict_json


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which fields differ, as in `: training.steps is 7, it was 5`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if not old or not changed:
        return ""
    shown = [
        f"{name} is {_short(new.get(name))}, it was {_short(old.get(name))}" for name in changed
    ]
    more = f" and {len(shown) - 4} more" if shown[4:] else ""
    return f": {'; '.join(shown[:4])}{more}"


def _short(value: Any) -> str:
    text = strict_json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item
