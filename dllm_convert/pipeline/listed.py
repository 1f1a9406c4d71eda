"""The shipped recipes as a table: what of, how large, on how much, how long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dllm_convert.common.quantities import count_text, hours_text
from dllm_convert.common.tables import Table
from dllm_convert.planning.rough import rough_hours
from dllm_convert.recipe.loading import RecipeEntry

HEADER = ("recipe", "preset", "source", "size", "target", "trains", "tokens", "takes", "licence")


def listed(entry: RecipeEntry) -> dict[str, Any]:
    """Return what `recipes --json` says of a recipe; hours are those of one of its device."""
    recipe = entry.recipe
    return {
        "name": entry.name,
        "description": recipe.description,
        "source": recipe.source,
        "license": recipe.license,
        "target": recipe.target,
        "block_size": recipe.block_size,
        "presets": list(entry.presets),
        "method": recipe.training.method,
        "parameters": recipe.parameters,
        "tokens": recipe.training_tokens,
        "device": recipe.device,
        "hours": rough_hours(recipe),
    }


def listed_rows(entries: Iterable[RecipeEntry]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table, as words."""
    rows: list[tuple[str, ...]] = []
    for one in map(listed, entries):
        block = f" {one['block_size']}" if one["block_size"] else ""
        hours = "" if one["hours"] is None else f"{hours_text(one['hours'])}, {one['device']}"
        rows.append(
            (
                one["name"],
                " ".join(one["presets"]),
                one["source"],
                count_text(one["parameters"]),
                f"{one['target']}{block}",
                one["method"],
                count_text(one["tokens"]),
                hours,
                one["license"] or "",
            )
        )
    return HEADER, rows


def listed_table(entries: Iterable[RecipeEntry]) -> Table:
    """Return what `dllm-convert recipes` prints."""
    header, rows = listed_rows(entries)
    return Table(header, rows)
