"""A checkpoint of the Hub is evaluated and sampled by its id, and its cache left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SourceFactory
from conversion import convert
from hub_server import COMMIT, LoopbackHub, run_python, serve
from tasks_on_disk import write_tasks
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.manifest import read_manifest, write_manifest
from dllm_convert.errors import DataError
from dllm_convert.pipeline.api.judging import evaluate

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
COMMAND = "import sys; from dllm_convert.cli.app import main; sys.argv[0] = 'dllm-convert'; main()"
MODULES = ["dllm_convert.evaluation.record", "dllm_convert.sampling.run"]
WORDS = "A name is bound to an object by assignment, and a list holds objects in order. " * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    plan = convert(source_cache("llama"), folder, "bd3lm", block=4)
    recipe = plan.recipe.model_dump(mode="json")
    write_manifest(folder, {"recipe": recipe, "files": {}})
    return folder


@pytest.fixture
def hub(made: Path) -> Iterator[LoopbackHub]:
    with serve(LoopbackHub(repos={"me/tiny": made})) as running:
        yield running


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(WORDS)
    return "words.txt"


def ask(hub: LoopbackHub, home: Path, *line: str) -> str:
    return run_python(COMMAND, *line, env=hub.environment(home), modules=MODULES)


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_of_the_hub_as_of_the_folder(
    hub: LoopbackHub, made: Path, words: str, tmp_path: Path
) -> None:
    """The same numbers; two evaluations come together; nothing of the cache is written in."""
    (tmp_path / "tasks").mkdir()
    tasks = ("--tasks", "capitals", "--include-path", str(write_tasks(tmp_path / "tasks")))
    how = ("--set", "draws=2", "--set", "rounds=1", "--limit", "2", "--json")
    ask(hub, tmp_path / "home", "evaluate", "me/tiny", "--data", words, *how)
    recorded = tmp_path / "me--tiny-evaluation" / "evaluation.json"
    text = json.loads(recorded.read_text())
    assert text["settings"]["checkpoint"] == f"me/tiny@{COMMIT}"
    cached = tree(tmp_path / "home" / "hub")
    told = json.loads(ask(hub, tmp_path / "home", "evaluate", "me/tiny", *tasks, *how))
    both = json.loads(recorded.read_text())
    assert both == told
    assert both["text"] == text["text"]
    assert both["results"]
    assert tree(tmp_path / "home" / "hub") == cached
    assert [path.name for path in recorded.parent.iterdir() if path.is_file()] == [recorded.name]
    here = tmp_path / "here"
    shutil.copytree(made, here)
    of_folder = json.loads(ask(hub, tmp_path / "home", "evaluate", str(here), *tasks, *how))
    assert of_folder["results"] == both["results"]
    assert read_manifest(here)["evaluation"] == of_folder
    assert "checkpoint" not in of_folder["settings"]


def test_a_folder_for_what_is_found(made: Path, words: str, tmp_path: Path) -> None:
    """With `out`, a checkpoint's own folder is left as it is, as one that cannot be written in."""
    before = tree(made)
    found = evaluate(made, data=words, settings={"draws": 2}, out=tmp_path / "found")
    kept = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert kept == found.as_dict()
    assert tree(made) == before
    assert "evaluation" not in read_manifest(made)


@pytest.mark.parametrize("wrong", ["file", "checkpoint"])
def test_the_folder_is_something_else(made: Path, words: str, tmp_path: Path, wrong: str) -> None:
    out = tmp_path / "out"
    if wrong == "file":
        out.write_text("mine")
    else:
        shutil.copytree(made, out)
    before = out.read_text() if wrong == "file" else tree(out)
    with pytest.raises(DataError, match=f"is a {wrong}, expected a folder"):
        evaluate(made, data=words, settings={"draws": 2}, out=out)
    assert (out.read_text() if wrong == "file" else tree(out)) == before


@pytest.mark.parametrize("options", [(), ("--revision", COMMIT)])
def test_a_revision(hub: LoopbackHub, words: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    ask(hub, tmp_path / "home", "evaluate", "me/tiny", "--data", words, *options, "--quiet")
    assert (tmp_path / "me--tiny-evaluation" / "evaluation.json").is_file()


def test_a_folder_has_no_revision(made: Path) -> None:
    line = ["evaluate", str(made), "--data", "pydoc", "--revision", "main"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert "is a folder, which has no revision" in " ".join(result.stderr.split())


def test_sampled_by_its_id(hub: LoopbackHub, made: Path, tmp_path: Path) -> None:
    how = ("--prompt", "A list", "--max-new-tokens", "8", "--seed", "0", "--json")
    of_hub = json.loads(ask(hub, tmp_path / "home", "sample", "me/tiny", *how))
    of_folder = json.loads(ask(hub, tmp_path / "home", "sample", str(made), *how))
    assert of_hub["text"] == of_folder["text"]


@pytest.mark.parametrize("checkpoint", ["me/tiny", "folder"])
def test_settings_that_do_not_fit_are_refused(
    hub: LoopbackHub, made: Path, tmp_path: Path, checkpoint: str
) -> None:
    """By the options' own names, whether the checkpoint is here or has to be looked at first."""
    named = str(made) if checkpoint == "folder" else checkpoint
    wrong = ("--remasking-ratio", "0.5", "--prompt", "A list")
    with pytest.raises(AssertionError, match=r"(?s)Usage.*Error.*--remasking-ratio"):
        ask(hub, tmp_path / "home", "sample", named, *wrong)
