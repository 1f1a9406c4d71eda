"""What is shipped is whole: the wheel is built, installed elsewhere and run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def _run(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    _run("-m", "build", "--no-isolation", "--outdir", str(folder), "--wheel", str(ROOT), cwd=folder)
    _run("-m", "build", "--no-isolation", "--outdir", str(folder), "--sdist", str(ROOT), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the wheel was installed."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    options = ("--quiet", "--no-deps", "--no-index", "--target", str(target))
    _run("-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def _sources(folder: str) -> set[str]:
    names = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(name) for name in names if "__pycache__" not in name.parts}


def test_wheel_holds_the_package_and_its_data_and_no_more(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = _sources("recipes") | _sources("cards")
    assert names == _sources("dllm_convert") | {f"dllm_convert/_data/{name}" for name in data}
    assert "dllm_convert/py.typed" in names


def test_wheel_has_licence_and_command(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    (points,) = (name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(points).decode()
    assert "dllm-convert = dllm_convert.cli:main" in text


def test_sdist_can_build_the_wheel(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = _sources("dllm_convert") | _sources("recipes") | _sources("cards")
    assert wanted | {"pyproject.toml", "LICENSE", "README.md"} <= names


def test_installed_package_finds_its_recipes(installed: Path, tmp_path: Path) -> None:
    command = ("-m", "dllm_convert", "recipes", "--json")
    here = json.loads(_run(*command, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert here == json.loads(_run(*command, cwd=ROOT))
    where = _run("-c", "import dllm_convert as d; print(d.__file__)", cwd=tmp_path,
                 PYTHONPATH=str(installed))  # fmt: skip
    assert where.startswith(str(installed))


def test_installed_package_finds_its_cards(installed: Path, tmp_path: Path) -> None:
    code = "import dllm_convert.recipe.loading as r; print(*sorted(r.data_dir('cards').iterdir()))"
    found = _run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert {Path(name).name for name in found} == {Path(name).name for name in _sources("cards")}
    assert all(name.startswith(str(installed)) for name in found)
