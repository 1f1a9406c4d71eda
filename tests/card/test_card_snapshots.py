"""Three whole cards, compared with the ones committed in tests/cards.

After a wanted change, write them anew and read the difference before committing it:

    UPDATE_CARDS=1 python -m pytest tests/card/test_card_snapshots.py
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from card_cases import CASES, Manifest, fill
from card_rules import card_problems

from dllm_convert.card.readme import render_card

EXPECTED = Path(__file__).parents[1] / "cards"
REPOSITORIES = {
    "mdlm-bert": None,
    "bd3lm-llama": "me/Llama-3.2-1B-bd3lm-32",
    "adapter-qwen2": "me/qwen2.5-3b-mdlm-lora",
}


@pytest.mark.parametrize(("name", "make"), CASES.items(), ids=CASES)
def test_the_card_is_the_committed_one(
    tmp_path: Path, name: str, make: Callable[[], Manifest]
) -> None:
    manifest = make()
    folder = fill(tmp_path, manifest)
    card = render_card(folder, manifest, repo_id=REPOSITORIES[name])
    assert card_problems(card, folder) == []
    path = EXPECTED / f"{name}.md"
    if os.environ.get("UPDATE_CARDS"):
        path.write_text(card, encoding="utf-8")
    committed = path.read_text(encoding="utf-8")
    lines = difflib.unified_diff(
        committed.splitlines(), card.splitlines(), "committed", "rendered", lineterm=""
    )
    assert committed == card, "\n".join(lines)


def test_every_committed_card_is_rendered() -> None:
    assert {path.stem for path in EXPECTED.iterdir()} == set(CASES) == set(REPOSITORIES)
