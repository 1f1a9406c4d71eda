"""What pictures show, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.card.tables import Table, attention_table, decoding_table, rates_table, sketch
from dllm_convert.common.tables import table
from dllm_convert.verification.observe.observations import Observations


def views_text(seen: Observations) -> list[str]:
    """Return the influence maps, the mask rates and the decoding speeds, a block of lines each.

    Args:
        seen: What was measured; of what was not nothing is said.
    """

    def shown(one: Table | None) -> list[str]:
        return [table(one.header, one.rows)] if one else []

    drawn = sketch(seen)
    attention = shown(attention_table(seen))
    maps = [f"Who sees whom: ## the position below sees the token above\n{drawn}"] if drawn else []
    return [*maps, *attention, *shown(rates_table(seen)), *shown(decoding_table(seen))]


def views_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the same of what a manifest holds."""
    return views_text(Observations.from_measurements(manifest.get("measurements") or {}))
