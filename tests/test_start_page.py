"""The page for beginners does what it says: its commands run, in its order, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import SourceFactory
from typer.testing import CliRunner

from dllm_convert.cli.app import app

PAGE = (Path(__file__).parent.parent / "docs/start.md").read_text(encoding="utf-8")
SMALLER = {
    "source: Qwen/Qwen2.5-1.5B-Instruct": "source: base",
    "block_size: 16": "block_size: 8",
    "sequence_length: 1024": "sequence_length: 64",
    "steps: 1000": "steps: 6",
    "gradient_accumulation: 32": "gradient_accumulation: 2",
}
"""What of the page is made smaller for a tiny model and a CPU."""


def blocks(language: str) -> list[tuple[str, str]]:
    """Title and text of the page's blocks in a language."""
    found = re.findall(rf'^```{language}(?: title="(.*?)")?\n(.*?)^```$', PAGE, re.M | re.S)
    return [(title, text) for title, text in found]


@pytest.mark.slow
def test_its_commands_run(
    tmp_path: Path, source_factory: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = source_factory("llama", tied=True, chat=True)
    base.rename(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for title, text in blocks("json"):
        lines = text.splitlines()
        assert all(json.loads(line)["messages"] for line in lines)
        # As many as a tenth of them can be held out.
        more = (line.replace("planet", f"planet {n}") for n in range(20) for line in lines)
        Path(title).write_text("\n".join(more) + "\n")
    for title, text in blocks("yaml"):
        for large, small in SMALLER.items():
            assert large in text
            text = text.replace(large, small)
        Path(title).write_text(text)
    commands = [line for _, text in blocks("sh") for line in text.splitlines()]
    assert len(commands) >= 5
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "dllm-convert"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}: {result.output} {result.stderr}"
    assert {"report.html", "README.md", "config.json"} <= {p.name for p in Path("mine").iterdir()}
    for _, code in blocks("python"):
        exec(compile(code, "docs/start.md", "exec"), {})


def test_its_inline_commands_exist() -> None:
    known = {command for command in re.findall(r"dllm-convert ([a-z-]+)", PAGE)}
    from typer.main import get_command

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert known <= commands, known - commands
