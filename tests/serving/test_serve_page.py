"""docs/serve.md says of engines what the layouts refuse and take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.planning.layouts.registry import TARGETS, reachable
from dllm_convert.serving.engines import ENGINES
from dllm_convert.serving.run import read_converted

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CAUSAL: dict[str, Any] = {"training": {"method": "none", "ar_loss_weight": 1.0}}


def table() -> dict[str, list[str]]:
    """Return the rows by layout: engines, then a cell per family, MDLM, shift and AR loss."""
    rows = re.findall(r"^\| (.+?) \| `([\w-]+)` \| (.+) \|$", PAGE, re.MULTILINE)
    return {
        name: [engines, *(cell.split()[0] for cell in cells.split(" | "))]
        for engines, name, cells in rows
        if name in TARGETS and len(cells.split(" | ")) == 7
    }


def test_every_layout_has_a_row_and_its_engines() -> None:
    for name, (engines, *_) in table().items():
        assert engines.split(", ") == list(TARGETS[name].engines)
    documented = set(table())
    assert documented >= {"sdar", "llada2", "nemotron", "a2d"}
    for codes in ENGINES.values():
        for code in codes:
            assert f"{code.name} {code.tried}" in PAGE


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_table_says_of_a_family_is_so(family: str, converted: Callable[..., Path]) -> None:
    blocks, causal = (
        {t.name: not why for t, why in reachable(read_converted(converted(family, **fields))[0])}
        for fields in ({}, CAUSAL)
    )
    shifted, whole = (
        {t.name: not why for t, why in reachable(read_converted(converted(family, **fields))[0])}
        for fields in ({"token_shift": "keep"}, {"target": "mdlm"})
    )
    for name, (_, *cells) in table().items():
        said = dict(zip((*FAMILIES, "mdlm", "shift", "causal"), cells, strict=True))
        fits = said[family] == "yes"
        assert fits == (causal if said["causal"] == "needed" else blocks)[name], name
        if fits:
            assert shifted[name] == (said["shift"] == "yes"), name
            assert whole[name] == (said["mdlm"] == "yes"), name
            assert causal[name] == (said["causal"] != "no"), name
