"""A run for people: what it will do, what came of it in a screenful, and all of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from dllm_convert.card.tables import MEASURES, views_of
from dllm_convert.common.shown_text import one_line, printable
from dllm_convert.common.tables import Block, Table, Toned, measure_cells
from dllm_convert.publishing.shown import push_lines
from dllm_convert.sampling.shown import sample_facts, sample_text
from dllm_convert.sampling.watch.layout import wrap
from dllm_convert.verification.shown import failures, tally, verification_blocks

WIDTH = 80
"""Columns of a terminal nobody has made wider."""
_FAILURES = 3
"""Failed probes that are named at once."""
_LINES = 3
"""Lines of a sample."""


def run_document(
    path: str, passed: bool, manifest: Mapping[str, Any], published: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what `run --json` prints; `published` is there only if something was."""
    document = {"path": path, "passed": passed, "manifest": dict(manifest)}
    return document | ({"published": dict(published)} if published else {})


def run_blocks(document: Mapping[str, Any]) -> list[Block]:
    """Return what `run` shows, at most 25 lines: verdict, failures, numbers, a sample, next steps.

    Args:
        document: What it prints with `--json`; of the manifest `verification`, `measurements`,
            `sample` and `files` are read.
    """
    manifest, path = document["manifest"], document["path"]
    published = document.get("published")
    numbers = _aligned(_numbers(manifest))
    sample = manifest.get("sample")
    written = _clipped(sample_text(sample)) if sample else []
    steps = _aligned(_next(path, manifest, publish=document["passed"] and not published))
    parts: list[list[Block]] = [
        _verdict(manifest["verification"]),
        numbers,
        [Toned("Sample", "head"), *written] if written else [],
        [Toned("Next", "head"), *steps],
    ]
    return [
        *(line for part in parts if part for line in (*part, "")),
        f"Checkpoint: {one_line(path)}",
        *(push_lines(published) if published else ()),
    ]


def _verdict(verification: Mapping[str, Any]) -> list[Block]:
    """Say whether it is what it claims to be, and what failed first."""
    counted = tally(verification)
    if verification["passed"]:
        return [Toned(f"Verified: {counted}", "good")]
    failed = failures(verification)
    more = len(failed) - _FAILURES
    return [
        Toned(f"VERIFICATION FAILED: {counted}", "bad"),
        *(_in_width(one_line(f"  {line}")) for line in failed[:_FAILURES]),
        *([f"  and {more} more; the same command with --verbose shows them"] if more > 0 else ()),
    ]


def _numbers(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the numbers that say what came of it: likelihoods, and how many tokens at a time."""
    measures = manifest.get("measurements") or {}
    for name, label in MEASURES.items():
        if name in measures:
            nats, *_ = measure_cells(measures[name])
            yield label, f"{nats} nats per token"
    sample = manifest.get("sample")
    if sample:
        yield "tokens per forward", f"{sample['tokens_per_forward']:.2f}"


def _next(path: str, manifest: Mapping[str, Any], *, publish: bool) -> Iterable[tuple[str, str]]:
    """Yield what to type next, and what for."""
    folder, files = shlex.quote(path), manifest.get("files") or {}
    yield f"dllm-convert sample {folder} --prompt TEXT", "goes on from a text"
    if "chat_template.jinja" in files:
        yield f"dllm-convert chat {folder}", "talks with it"
    yield f"dllm-convert verify {folder}", "looks at it again"
    if publish:
        yield f"dllm-convert push {folder} NAME", "publishes it"
    yield one_line(str(Path(path) / "report.html")), "shows what was measured"


def _aligned(pairs: Iterable[tuple[str, str]]) -> list[Block]:
    """Return two columns; where there is no room for the second one, the first."""
    rows = list(pairs)
    table = Table(("", ""), rows, indent=2)
    if not rows or max(map(cell_len, str(table).split("\n"))) <= WIDTH:
        return [table] if rows else []
    return [f"  {first}" for first, _ in rows]


def _clipped(text: str) -> list[str]:
    """Return the first lines of a text, as wide as a terminal."""
    shown = printable(text).replace("\t", " ")
    lines = ["".join(part.text for part in line).strip() for line in wrap([shown], WIDTH - 6)]
    kept = [f"  {line}" for line in lines if line]
    return kept if len(kept) <= _LINES else [*kept[: _LINES - 1], f"{kept[_LINES - 1]} …"]


def _in_width(line: str) -> str:
    """Return a line that is no wider than a terminal."""
    return line if cell_len(line) <= WIDTH else f"{set_cell_size(line, WIDTH - 2)} …"


def detail_blocks(document: Mapping[str, Any]) -> list[Block]:
    """Return what `run --verbose` shows: every probe, all measurements, a sample, the path.

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
        for one in (sample, *sample.get("more", ())):
            blocks += ["", f"Sample ({sample_facts(one)})", sample_text(one)]
            if one.get("base"):
                blocks += ["", "The base, autoregressively", sample_text(one, "base")]
    published = document.get("published")
    return [
        *blocks,
        "",
        f"Checkpoint: {one_line(document['path'])}",
        *(push_lines(published) if published else ()),
    ]
