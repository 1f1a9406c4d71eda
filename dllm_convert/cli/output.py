"""What commands print on stdout: one JSON document, or text for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dllm_convert.cli.streams import lost, silence
from dllm_convert.cli.views import views_of
from dllm_convert.common import strict_json
from dllm_convert.common.shown_text import json_safe, one_line, printable

_MEASURES = {
    "nelbo_before": "NELBO before training",
    "nelbo_after": "NELBO after training",
    "ar_nll": "AR NLL of the base",
}

_VERDICTS = {True: "ok", False: "FAILED", None: "skipped"}


def write_json(value: Any) -> None:
    """Write the one JSON document of a `--json` command."""
    document = strict_json.dumps(value, indent=2, ensure_ascii=False, default=str)
    write(json_safe(document), verbatim=True)


def write(text: str, *, verbatim: bool = False) -> None:
    """Write text and a line end to stdout, the one place that does.

    Where nobody reads it, closed or gone as with `| head`, nothing was asked for: what the command
    did is what counts.

    Args:
        text: What to show.
        verbatim: Write it as it is; otherwise nothing in it acts on a terminal.

    Raises:
        OutputError: It cannot be written for another reason, such as a full disk.
    """
    if sys.stdout is None:
        return
    shown = text if verbatim else printable(text)
    try:
        # A plain write: rich would wrap at 80 columns where stdout is a pipe.
        sys.stdout.write(shown.rstrip("\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        raise lost(error) from error


def show(document: Any, as_text: Callable[[Any], str], *, as_json: bool) -> None:
    """Write what a command found: as its one JSON document, or as text for people."""
    if as_json:
        write_json(document)
    else:
        write(as_text(document))


def verify_text(document: Mapping[str, Any]) -> str:
    """Return what `verify` shows, from the document it would print with `--json`."""
    report = document.get("report")
    parts = [verification_table(document), *views_of(document)]
    return "\n\n".join([*parts, f"Report: {report}"] if report else parts)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return aligned columns; the last one is as wide as it needs."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def verification_table(verification: Mapping[str, Any]) -> str:
    """Return the probes of a report, one line each, and what they come to.

    Below a failed probe stands the first thing that is wrong, and why its tolerance is what it is.

    Args:
        verification: `passed`, and `probes` of `name`, `passed` (None if the probe was not run),
            `measured`, `required`, `detail` and `origin`; `seconds` if it was timed.
    """
    probes = verification["probes"]
    rows = [
        (_VERDICTS[probe["passed"]], probe["name"], probe.get("detail"), "")
        if probe["passed"] is None
        else (
            _VERDICTS[probe["passed"]],
            probe["name"],
            probe.get("measured"),
            probe.get("required"),
        )
        for probe in probes
    ]
    header, *lines = table(("", "probe", "measured", "required"), rows).split("\n")
    shown = [header]
    for line, probe in zip(lines, probes, strict=True):
        shown.append(line)
        if probe["passed"] is False:
            notes = (probe.get("detail"), probe.get("origin"))
            shown += [f"{'':9}{one_line(note)}" for note in notes if note]
    return "\n".join([*shown, "", _tally(verification)])


def _tally(verification: Mapping[str, Any]) -> str:
    """Return how many probes passed, failed and were not run, on one line."""
    verdicts = [probe["passed"] for probe in verification["probes"]]
    passed, failed, unknown = (verdicts.count(verdict) for verdict in (True, False, None))
    seconds = verification.get("seconds")
    took = "" if seconds is None else f" in {seconds:.0f} s"
    return f"{passed} of {len(verdicts)} probes passed, {failed} failed, {unknown} not run{took}"


def failed_probes(verification: Mapping[str, Any]) -> str:
    """Return the failed probes of a report on one line, with what was measured and required."""
    return "; ".join(
        f"{probe['name']}: measured {_cell(probe.get('measured')) or 'nothing'}, "
        f"required {_cell(probe.get('required')) or 'to pass'}"
        for probe in verification["probes"]
        if probe["passed"] is False
    )


def run_summary(path: str, manifest: Mapping[str, Any]) -> str:
    """Return what a finished run shows: verification, measurements, a sample, the path.

    Args:
        path: Folder of the checkpoint.
        manifest: Content of dllm_convert.json; reads `verification`, `measurements` and `sample`.
    """
    parts = ["Verification", verification_table(manifest["verification"])]
    measures = manifest.get("measurements") or {}
    rows = [
        (label, *_measure(measures[name])) for name, label in _MEASURES.items() if name in measures
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
    return f"{summary}\n{push_summary(published)}" if published else summary


def push_summary(result: Mapping[str, Any]) -> str:
    """Return what a finished push shows: what went up, what was checked, where it is.

    Args:
        result: Fields of `PushResult`.
    """
    confirmed = result["confirmed"]
    passed = sum(probe["passed"] is True for probe in confirmed["probes"])
    lines = [
        f"Uploaded: {len(result['uploaded'])} files, {result['uploaded_bytes']:,} bytes"
        if result["uploaded"]
        else "Uploaded: nothing, the Hub had every file",
        f"Confirmed: {confirmed['files']} files downloaded again and equal, "
        f"{passed} of {len(confirmed['probes'])} checks passed on the download",
        f"Commit: {result['commit_url']}",
    ]
    if result["deleted"]:
        lines.insert(1, f"Removed: {', '.join(result['deleted'])}")
    if result["pull_request"]:
        lines.append(f"Pull request: {result['pull_request']}")
    visible = "private" if result["private"] else "public"
    return "\n".join([*lines, f"Published ({visible}): {result['url']}"])


def sample_facts(sample: Mapping[str, Any]) -> str:
    """Return how fast a sample was decoded, in words."""
    return f"{sample['tokens_per_forward']:.2f} tokens per forward, {sample['seconds']:.1f} s"


def _measure(value: Mapping[str, Any]) -> tuple[str, str, Any]:
    nats, stderr = value["nats_per_token"], value.get("stderr")
    if nats is None:
        return "no number", "no number", value.get("tokens")
    spread = f" ± {stderr:.3f}" if stderr is not None else ""
    # exp overflows a float above 709 nats; such a model has no perplexity worth a number.
    perplexity = f"{math.exp(nats):.4g}" if nats < 700 else "inf"
    return f"{nats:.3f}{spread}", perplexity, value.get("tokens")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    # A name with a line end must not begin a row of its own.
    return f"{value:.4g}" if isinstance(value, float) else one_line(str(value))


def evaluation_text(evaluation: Mapping[str, Any]) -> str:
    """Return the tables of an evaluation: both models on the same items, and the sweep.

    Args:
        evaluation: The `evaluation` section of the manifest.
    """
    parts = []
    if evaluation.get("results"):
        parts += _task_tables(evaluation)
    text = evaluation.get("text")
    if text:
        labels = {"nelbo": "NELBO of the conversion", "nll": "NLL of the base"}
        rows = [(label, *_measure(text[key])) for key, label in labels.items() if key in text]
        parts.append(table((text["source"], "nats per token", "perplexity", "tokens"), rows))
    return "\n\n".join(parts)


def _task_tables(evaluation: Mapping[str, Any]) -> list[str]:
    header = ("task", "metric", "base", "conversion", "difference")
    rows = [
        (
            row["task"],
            row["metric"],
            _interval(row.get("before")),
            _interval(row["after"]),
            _interval(row.get("difference"), sign="+"),
        )
        for row in evaluation["results"]
    ]
    parts = [table(header, rows)]
    if evaluation.get("sweep"):
        columns = ("threshold", "task", "metric", "tokens_per_forward", "tokens_per_second")
        sweep = [
            (*(row[name] for name in columns[:3]), _interval(row), *(row[n] for n in columns[3:]))
            for row in evaluation["sweep"]
        ]
        names = ("threshold", "task", "metric", "score", "tokens per forward", "tokens/s")
        parts.append(table(names, sweep))
    parts += _effort_lines(evaluation["effort"])
    return parts


def _effort_lines(effort: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, name in (("before", "base"), ("after", "conversion")):
        took = effort.get(key) or {}
        if took.get("new_tokens"):
            lines.append(
                f"{name}: {took['new_tokens']:,} tokens written, {took['tokens_per_forward']} per "
                f"forward, {took['tokens_per_second']} per second"
            )
        if took.get("draws_saved"):
            lines.append(f"{name}: {took['draws_saved']:.0%} of the draws saved by stopping early")
    return ["\n".join(lines)] if lines else []


def _interval(mean: Mapping[str, Any] | None, *, sign: str = "") -> str:
    if mean is None:
        return "-"
    width = mean["half_width"]
    return f"{mean['value']:{sign}.3f}" + ("" if width is None else f" ± {width:.3f}")
