"""A finished run, and a verification with its pictures, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.card.views import views_of
from dllm_convert.common.shown_text import one_line
from dllm_convert.common.tables import measure_cells, table
from dllm_convert.sampling.shown import sample_facts
from dllm_convert.verification.shown import verification_table

_MEASURES = {
    "nelbo_before": "NELBO before training",
    "nelbo_after": "NELBO after training",
    "ar_nll": "AR NLL of the base",
}


def verify_text(document: Mapping[str, Any]) -> str:
    """Return what `verify` shows, from the document it would print with `--json`."""
    report = document.get("report")
    parts = [verification_table(document), *views_of(document)]
    return "\n\n".join([*parts, f"Report: {report}"] if report else parts)


def run_summary(path: str, manifest: Mapping[str, Any]) -> str:
    """Return what a finished run shows: verification, measurements, a sample, the path.

    Args:
        path: Folder of the checkpoint.
        manifest: Content of dllm_convert.json; reads `verification`, `measurements` and `sample`.
    """
    parts = ["Verification", verification_table(manifest["verification"])]
    measures = manifest.get("measurements") or {}
    rows = [
        (label, *measure_cells(measures[name]))
        for name, label in _MEASURES.items()
        if name in measures
    ]
    if rows:
        header = ("held-out text", "nats per token", "perplexity", "tokens")
        parts += ["", "Measurements", table(header, rows)]
    for block in views_of(manifest):
        parts += ["", block]
    sample = manifest.get("sample")
    if sample:
        parts += ["", f"Sample ({sample_facts(sample)})", sample["prompt"] + sample["text"]]
    return "\n".join([*parts, "", f"Checkpoint: {one_line(path)}"])


def run_document(
    path: str, passed: bool, manifest: Mapping[str, Any], published: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what `run --json` prints; `published` is there only if something was."""
    document = {"path": path, "passed": passed, "manifest": dict(manifest)}
    return document | ({"published": dict(published)} if published else {})


def run_text(document: Mapping[str, Any]) -> str:
    """Return what `run` shows, from the document it would print with `--json`."""
    summary = run_summary(document["path"], document["manifest"])
    published = document.get("published")
    if not published:
        return summary
    from dllm_convert.publishing.shown import push_summary

    return f"{summary}\n{push_summary(published)}"
