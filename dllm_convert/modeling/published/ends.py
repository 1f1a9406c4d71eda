"""Token ids as configs give them: one, several, or none."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def read_ids(value: Any, name: str = "eos_token_id") -> tuple[int, ...]:
    """Return the ids that a field of a config names, each once; None and negative ones are none."""
    given = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(given, list | tuple | set | frozenset)
    values = () if given is None else tuple(given) if several else (given,)
    for token in values:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise ValueError(f"{name} is {value!r}, expected the id of a token or a list of ids")
    return tuple(dict.fromkeys(int(token) for token in values if token >= 0))
