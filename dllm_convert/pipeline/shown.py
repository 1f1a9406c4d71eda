"""A finished run for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.card.tables import MEASURES, views_of
from dllm_convert.common.shown_text import one_line
from dllm_convert.common.tables import Block, Table, measure_cells
from dllm_convert.publishing.shown import push_lines
from dllm_convert.sampling.shown import sample_facts
from dllm_convert.verification.shown import verification_blocks


def run_document(
    path: str, passed: bool, manifest: Mapping[str, Any], published: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what `run --json` prints; `published` is there only if something was."""
    document = {"path": path, "passed": passed, "manifest": dict(manifest)}
    return document | ({"published": dict(published)} if published else {})


def run_blocks(document: Mapping[str, Any]) -> list[Block]:
    """Return what `run` shows: verification, measurements, a sample, the path, what was published.

    Args:
        document: What it prints with `--json`; of the manifest `verification`, `measurements` and
            `sample` are read.
    """
    manifest = document["manifest"]
    blocks: list[Block] = ["Verification", *verification_blocks(manifest["verification"])]
    measures = manifest.get("measurements") or {}
    rows = [
        (label, *measure_cells(measures[name]))
        for name, label in MEASURES.items()
        if name in measures
    ]
    if rows:
        header = ("held-out text", "nats per token", "perplexity", "tokens")
        blocks += ["", "Measurements", Table(header, rows)]
    for block in views_of(manifest):
        blocks += ["", block]
    sample = manifest.get("sample")
    if sample:
        blocks += ["", f"Sample ({sample_facts(sample)})", sample["prompt"] + sample["text"]]
    published = document.get("published")
    return [
        *blocks,
        "",
        f"Checkpoint: {one_line(document['path'])}",
        *(push_lines(published) if published else ()),
    ]
