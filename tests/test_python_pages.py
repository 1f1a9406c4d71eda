"""docs/python.md and the notebook run, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory

import dllm_convert as dc

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((DOCS / "conversion.ipynb").read_text(encoding="utf-8"))
SMALL = {
    "HuggingFaceTB/SmolLM2-135M": "base",
    "steps=200": 'steps=2, verify="files"',
    "max_steps=100": "max_steps=2",
    '"data.sequence_length": 256': '"data.sequence_length": 64, "training.batch_size": 2',
    'dc.load("me/smollm2-bd3lm")': 'dc.load("out")',
    "rows=800": "rows=8",
    "max_new_tokens=64": "max_new_tokens=32",
}
"""What the page says, and what a test has time for."""


@pytest.fixture
def here(tmp_path: Path, source_factory: SourceFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny `base` and some `texts`."""
    source_factory("llama").rename(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    lines = [
        json.dumps({"text": " ".join(f"A name {n} is bound to a value {n + k}." for k in range(9))})
        for n in range(60)
    ]
    (tmp_path / "texts" / "some.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.mark.slow
def test_the_page_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dc, "push", lambda *where: pushed.append(where), raising=False)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks)
    for said, tried in SMALL.items():
        assert said in code
        code = code.replace(said, tried)
    space: dict[str, Any] = {}
    exec(code, space)
    assert pushed == [("out", "me/smollm2-bd3lm")]
    assert (here / "out-2" / "config.json").is_file()
    assert (here / "out" / "README.md") == here / space["card"].path
    assert space["bound"].nats_per_token > 0
    assert len(space["text"].train) == 8
    assert len(space["sample"].text) > 0


@pytest.mark.parametrize("module", [dc, dc.diffusion, dc.training], ids=lambda m: m.__name__)
def test_the_page_names_all_that_is_offered(module: Any) -> None:
    code = " ".join(re.findall(r"`[^`\n]+`|```.*?```", PAGE, re.DOTALL))
    missing = [name for name in module.__all__ if not re.search(rf"\b{name}\b", code)]
    assert set(missing) <= {"__version__"}


def test_the_page_names_nothing_else() -> None:
    offered = {f"dc.{name}" for name in dc.__all__}
    offered |= {f"dc.diffusion.{name}" for name in dc.diffusion.__all__}
    offered |= {f"dc.training.{name}" for name in dc.training.__all__}
    assert set(re.findall(r"\bdc(?:\.(?:diffusion|training))?\.\w+", PAGE)) <= offered


def test_the_notebook_is_one() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert not cell.get("outputs")


@pytest.mark.slow
def test_the_notebook_runs(here: Path) -> None:
    """Each cell by itself, and what its last line shows."""
    cells = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]
    space: dict[str, Any] = {}
    for cell in cells:
        code = re.sub(r"^SOURCE = .*", 'SOURCE = "base"', cell, flags=re.M)
        code = re.sub(r"^STEPS = .*", "STEPS = 2", code, flags=re.M)
        small = 'overrides={"data.sequence_length": 64, "training.batch_size": 2})'
        code = code.replace("steps=STEPS)", f"steps=STEPS, {small}")
        exec(code, space)
    assert space["result"].report.probes
    assert space["pictures"]
    for name in ("plan", "result"):
        assert '<th scope="row">' in space[name]._repr_html_()
