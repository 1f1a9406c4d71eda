"""What a plan needs, for people: memory by method, sharing, stage and device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dllm_convert.common.quantities import bytes_text, hours_text, rate_text
from dllm_convert.common.tables import Block, Table

AGAIN = {"off": "nothing", "selective": "norms, gates", "full": "layers"}
"""What is computed again in the backward pass, by the recipe's word for it."""


def strategies(rows: Sequence[Mapping[str, Any]], method: str) -> list[Block]:
    """Compare the ways in which so many GPUs can share a training, if there are several."""
    if not rows:
        return []
    marked = [{**row, "of": "asked for" if row["asked"] else ""} for row in rows]
    title = f"Peak memory of each GPU by what is shared, method {method}"
    return ["", title, memory_table(marked, {"strategy": "strategy", "": "of"})]


def memory_table(
    rows: Iterable[Mapping[str, Any]], named: Mapping[str, str] | None = None
) -> Table:
    """Break peaks down, a row each.

    Args:
        rows: What `estimate` found.
        named: Columns in front by the field that they show; method and device by default.
    """
    names = {"method": "method", "on": "on"} if named is None else named
    columns = {
        "peak": "total", "weights": "weights", "teacher": "teacher", "gradients": "gradients",
        "AdamW": "moments", "activations": "activations", "logits": "logits",
        "exchanged": "exchanged", "writing": "writing",
    }  # fmt: skip
    rows = list(rows)
    for column in ("teacher", "exchanged", "writing"):
        if not any(row[column] for row in rows):
            del columns[column]
    return Table(
        (*names, *columns, "again"),
        [
            (
                *(row[key] for key in names.values()),
                *(bytes_text(row[key]) for key in columns.values()),
                AGAIN[row["checkpointing"]],
            )
            for row in rows
        ],
    )


def stages_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Show each stage on a CPU, on a GPU, and in host memory beside that."""
    by_stage: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], {})[row["on"]] = row
    return Table(
        ("stage", "on a CPU", "on a GPU", "held in", "host memory beside it"),
        [
            (
                name,
                bytes_text(on["cpu"]["device"]),
                bytes_text(on["gpu"]["device"]),
                on["gpu"]["held"] or "-",
                bytes_text(on["gpu"]["host"]),
            )
            for name, on in by_stage.items()
        ],
    )


def devices_table(devices: Iterable[Mapping[str, Any]], *, limited: bool) -> Table:
    """Show what fits each device, and how fast it trains; `limited`: by a time."""
    rows = []
    for device in devices:
        reached = (f"{device['tokens']:,}",) if limited else ()
        rows.append(
            (
                device["device"],
                bytes_text(device["stage_memory"]),
                fits_text(device),
                rate_text(device["tokens_per_second"]),
                hours_text(device["hours"]),
                *reached,
            )
        )
    more = ("tokens in the time",) if limited else ()
    return Table(("device", "memory", "fits", "tokens/s", "all steps in", *more), rows)


def fits_text(device: Mapping[str, Any]) -> str:
    """Say whether one device is enough, how many are, or what would make it fit."""
    if device["fits"] is None:
        return "memory unknown"
    if device["fits"]:
        return "1 is enough" if device["processes"] == 1 else "yes"
    if device["gpu"] and device["stage"] != "train":
        # No number of devices helps: what is measured runs on one, or else in host memory.
        trained = f"{device['devices_needed']} train it, " if device["devices_needed"] else ""
        taken = bytes_text(device["stage_memory"])
        return f"{trained}{device['stage']} takes {taken}: measured on the CPU"
    needed, processes = device["devices_needed"], device["processes"]
    if needed and processes > 1:
        more = f" and {needed} processes" if needed > processes else ""
        other = f", or {device['fits_with']}" if device["fits_with"] else ""
        return f"needs FSDP2{more}{other}"
    if needed:
        other = f", or 1 with {device['fits_with']}" if device["fits_with"] else ""
        return f"{needed} needed{other}"
    if device["fits_with"]:
        return f"1 with {device['fits_with']}"
    more = ": a smaller batch or shorter rows" if device["gpu"] else ""
    return f"does not fit {bytes_text(device['room'])}{more}"
