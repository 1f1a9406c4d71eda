"""The rooms and their layers: what import-linter checks, and that it would see a breach."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run())"
ROOMS = sorted(p.name for p in (ROOT / "dllm_convert").iterdir() if (p / "__init__.py").is_file())


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        capture_output=True, text=True, cwd=folder, env=environment,
    )  # fmt: skip


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package, free to break."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dllm_convert", tmp_path / "dllm_convert", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_room_imports_only_what_stands_below_it() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


UPWARD = {
    "at the top": ("common/nearest.py", "from dllm_convert.cli import app\n"),
    "inside a function": (
        "source/info.py",
        "def late() -> None:\n    from dllm_convert.planning import conversion\n",
    ),
    "for a type": (
        "recipe/schema.py",
        "if TYPE_CHECKING:\n    from dllm_convert.training import trainer\n",
    ),
    "between siblings": ("sampling/run.py", "from dllm_convert.planning import costs\n"),
    "out of what travels": (
        "modeling/published/ends.py",
        "from dllm_convert.common import nearest\n",
    ),
    "from the mathematics": (
        "diffusion/schedule.py",
        "from dllm_convert.recipe import schema\n",
    ),
}


@pytest.mark.parametrize("where", UPWARD)
def test_a_planted_import_is_seen(where: str, copied: Path) -> None:
    name, line = UPWARD[where]
    path = copied / "dllm_convert" / name
    path.write_text(path.read_text() + "\nfrom typing import TYPE_CHECKING\n\n" + line)
    done = lint(copied)
    assert done.returncode == 1, done.stdout
    assert "1 broken" in done.stdout


def test_a_room_that_no_layer_names_is_seen(copied: Path) -> None:
    room = copied / "dllm_convert" / "attic"
    room.mkdir()
    (room / "__init__.py").write_text("")
    assert lint(copied).returncode == 1


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_says_what_it_is(room: str) -> None:
    page = (ROOT / "dllm_convert" / room / "README.md").read_text()
    for question in ("**In**", "**Out**", "**Start**", "**May import**"):
        assert question in page
    assert len(page.splitlines()) <= 16


WRITTEN = "modeling_dllm.py"
"""A file of every output, not of the package."""


def named(page: Path, *folders: Path) -> dict[str, bool]:
    """Module paths that a page names, and whether they are there."""
    names = set(re.findall(r"`([\w/]+\.py)`", page.read_text())) - {WRITTEN}
    return {name: any((folder / name).is_file() for folder in folders) for name in names}


def test_the_modules_that_contributing_names_are_there() -> None:
    found = named(ROOT / "CONTRIBUTING.md", ROOT / "dllm_convert", ROOT, ROOT / "tests")
    assert len(found) > 40
    assert [name for name, there in found.items() if not there] == []


@pytest.mark.parametrize("room", ROOMS)
def test_the_modules_that_a_room_names_are_there(room: str) -> None:
    folder = ROOT / "dllm_convert" / room
    found = named(folder / "README.md", folder, folder.parent)
    assert [name for name, there in found.items() if not there] == []
