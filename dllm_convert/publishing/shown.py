"""A push for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.common.tables import Block


def push_lines(result: Mapping[str, Any]) -> list[Block]:
    """Return what a finished push shows: what went up, what was checked, where it is.

    Args:
        result: Fields of `PushResult`.
    """
    confirmed = result["confirmed"]
    probes = confirmed["probes"]
    passed = sum(probe["passed"] is True for probe in probes)
    lines: list[Block] = [
        f"Uploaded: {len(result['uploaded'])} files, {result['uploaded_bytes']:,} bytes"
        if result["uploaded"]
        else "Uploaded: nothing, the Hub had every file",
        f"Confirmed: {confirmed['files']} files downloaded again and equal"
        + (f", {passed} of {len(probes)} checks passed on the download" if probes else ""),
        f"Commit: {result['commit_url']}",
    ]
    if result["deleted"]:
        lines.insert(1, f"Removed: {', '.join(result['deleted'])}")
    if result["pull_request"]:
        lines.append(f"Pull request: {result['pull_request']}")
    visible = "private" if result["private"] else "public"
    return [*lines, f"Published ({visible}): {result['url']}"]
