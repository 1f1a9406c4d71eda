"""The targets by name, in the order in which they are listed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from dllm_convert.errors import RequestError
from dllm_convert.planning.layouts import a2d, gguf, gguf_diffusion, llada2, nemotron, sdar
from dllm_convert.planning.layouts.gguf import GgufLayout
from dllm_convert.planning.layouts.target import Converted, Refusal, Target

TARGETS: Mapping[str, Target | GgufLayout] = {
    target.name: target
    for target in (
        sdar.TARGET,
        llada2.TARGET,
        gguf.TARGET,
        gguf_diffusion.TARGET,
        nemotron.TARGET,
        a2d.TARGET,
    )
}


MERGED = "merged"
"""No layout of an engine, but an adapter and its base as one folder; `export` knows it too."""


def target_of(name: str) -> Target | GgufLayout:
    """Return a target.

    Raises:
        RequestError: There is none of that name.
    """
    if name not in TARGETS:
        known = (*TARGETS, MERGED)
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise RequestError(
            f"there is no export to {name!r}, expected one of {', '.join(known)}{meant}",
            argument="to",
        )
    return TARGETS[name]


def reachable(converted: Converted) -> Iterator[tuple[Target | GgufLayout, tuple[Refusal, ...]]]:
    """Yield every target with what stands in its way; nothing if it can be had."""
    for target in TARGETS.values():
        yield target, tuple(target.stands_in_the_way(converted))
