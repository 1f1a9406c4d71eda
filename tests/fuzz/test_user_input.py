"""Five hundred mutations of what users hand in: every command ends with a code, none with a trace.

To repeat one: `python -m pytest tests/fuzz -k rows-40`; the log of a failure names seed, damage and
command. Other seeds: `FUZZ_FIRST=5000`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_prepare import fuzz, prepare
from hub_server import LoopbackHub, serve

EACH, AT_ONCE = 100, 20
KINDS = ("config", "tokenizer", "recipe", "prompt", "rows")
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz") / "prepared"
    prepare(root)
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with serve(LoopbackHub(tmp_path_factory.mktemp("hub"))) as served:
        yield served


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST, FIRST + EACH, AT_ONCE))
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_ends_with_a_code(
    hub: LoopbackHub, prepared: Path, tmp_path: Path, kind: str, first: int
) -> None:
    log = tmp_path / "log"
    done = fuzz(hub, prepared, kind, first, AT_ONCE, log)
    outcomes: list[dict[str, Any]] = [json.loads(line) for line in log.open()]
    assert done.returncode == 0, (outcomes[-1:], done.stderr[-2000:])
    assert {outcome["seed"] for outcome in outcomes} == set(range(first, first + AT_ONCE))
    wrong = [o for o in outcomes if o["trace"] or o["code"] not in range(5)]
    assert not wrong, json.dumps(wrong[0], indent=1).replace("\\n", "\n")
