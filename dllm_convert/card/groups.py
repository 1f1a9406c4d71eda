"""The checks of a verification by what they are about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TITLES: Mapping[str, tuple[str, ...]] = {
    "Files and weights": ("config", "weights", "index", "dtypes", "finite", "hashes", "adapter"),
    "Mask, tokenizer and text": (
        *("mask", "tokenizer", "generation", "text", "special", "chat"),
        *("template",),
    ),
    "Alone in a fresh process": ("portable",),
    "Who sees whom": ("attention", "gradient", "training", "packed", "gate"),
    "Beside the base": ("base", "gated", "lossless"),
    "Decoding": (
        *("cache", "padding", "batch", "implementations", "generate", "quality", "block"),
        *("token",),
    ),
    "On the device": ("device", "cuda"),
}
"""First words of their names, which a hyphen ends."""
_OTHERS = "Others"


@dataclass(frozen=True)
class Group:
    """Checks about one thing.

    Attributes:
        title: What they are about.
        probes: The checks, failures first, then those that were not run.
        counts: How many passed, failed and were not run, in words.
        failed: Names of those that failed.
    """

    title: str
    probes: tuple[Mapping[str, Any], ...]
    counts: str
    failed: tuple[str, ...]


def group_probes(probes: Iterable[Mapping[str, Any]]) -> tuple[Group, ...]:
    """Return the checks in groups, those with failures first."""
    homes = {word: title for title, words in TITLES.items() for word in words}
    found: dict[str, list[Mapping[str, Any]]] = {title: [] for title in (*TITLES, _OTHERS)}
    for probe in probes:
        word = str(probe.get("name") or "").partition("-")[0]
        found[homes.get(word, _OTHERS)].append(probe)
    groups = [_group(title, held) for title, held in found.items() if held]
    return tuple(sorted(groups, key=lambda group: not group.failed))


def _group(title: str, probes: list[Mapping[str, Any]]) -> Group:
    # What is no verdict is no pass either.
    order = {"None": 1, "True": 2}
    ordered = sorted(probes, key=lambda probe: order.get(str(probe.get("passed")), 0))
    verdicts = [probe.get("passed") for probe in ordered]
    passed, unknown = verdicts.count(True), verdicts.count(None)
    failed = tuple(
        " ".join(str(probe.get("name") or "unnamed").split())
        for probe in ordered
        if probe.get("passed") not in (True, None)
    )
    said = [f"{passed} of {len(ordered)} passed"]
    said += [f"{len(failed)} failed"] if failed else []
    said += [f"{unknown} not run"] if unknown else []
    return Group(title, tuple(ordered), ", ".join(said), failed)
