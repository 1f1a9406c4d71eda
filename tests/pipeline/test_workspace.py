"""The output folder: refused when it is not ours, resumed when it is, published all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dllm_convert.common.json_files import write_json
from dllm_convert.errors import DataError
from dllm_convert.pipeline.workspace import (
    check_apart,
    fingerprint,
    goes_on,
    open_workspace,
    read_workspace,
)


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with (
        pytest.raises(DataError, match="is a file, expected a folder"),
        open_workspace(tmp_path / "out", "a"),
    ):
        pass
    assert (tmp_path / "out").read_text() == "x"


def test_out_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not made by dllm-convert"), open_workspace(tmp_path, "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_out_cannot_be_written(tmp_path: Path) -> None:
    # A folder inside a file cannot be made by anybody, root included.
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="cannot be written"),
        open_workspace(tmp_path / "file" / "out", "a"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_out_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"), open_workspace(tmp_path / "out", "a"):
        pass


@pytest.mark.parametrize("left", ["train", "write", "views", "trainer/", "written/", "staged/"])
def test_another_recipe_is_refused(tmp_path: Path, left: str) -> None:
    """Once anything stands there that takes long to make, whole or begun."""
    with open_workspace(tmp_path / "out", "a") as workspace:
        workspace.stage("adapt", dict)
        if left.endswith("/"):
            (workspace.work / left).mkdir()
        else:
            workspace.stage(left, dict)
    with (
        pytest.raises(DataError, match="different recipe or source"),
        open_workspace(tmp_path / "out", "b"),
    ):
        pass


def test_one_that_hardly_began_makes_way(tmp_path: Path) -> None:
    with open_workspace(tmp_path / "out", "a", {"data": "wrong"}) as workspace:
        workspace.stage("materialise", dict)
        workspace.stage("adapt", lambda: {"value": 1})
        (workspace.work / "untrained").mkdir()
        (workspace.work / "data").mkdir()
    assert goes_on(tmp_path / "out", "a") and not goes_on(tmp_path / "out", "b")
    with open_workspace(tmp_path / "out", "b", {"data": "right"}) as workspace:
        assert workspace.result("adapt") is None
        assert not (workspace.work / "untrained").exists()
        assert not (workspace.work / "data").exists()
    assert goes_on(tmp_path / "out", "b")
    assert read_workspace(tmp_path / "out").asked == {"data": "right"}


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with (
        open_workspace(tmp_path / "out", "a"),
        pytest.raises(DataError, match="another run is writing"),
        open_workspace(tmp_path / "out", "a"),
    ):
        pass


def test_a_finished_stage_is_not_repeated(tmp_path: Path) -> None:
    with open_workspace(tmp_path / "out", "a") as workspace:
        assert workspace.stage("one", lambda: {"value": 1}) == {"value": 1}
        with pytest.raises(ZeroDivisionError):
            workspace.stage("two", lambda: {"value": 1 // 0})
    with open_workspace(tmp_path / "out", "a") as workspace:
        assert workspace.stage("one", lambda: {"value": 2}) == {"value": 1}
        assert workspace.stage("two", lambda: {"value": 2}) == {"value": 2}
    journal = json.loads((tmp_path / "out/.work/journal.json").read_text())
    assert [stage["name"] for stage in journal["stages"]] == ["one", "two"]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_between_renames_is_finished_later(tmp_path: Path, moved: int) -> None:
    out = tmp_path / "out"
    with open_workspace(out, "a") as workspace:
        workspace.staged.mkdir()
        for name in ("config.json", "a.safetensors", "README.md"):
            (workspace.staged / name).write_text(name)
        order = sorted(workspace.staged.iterdir(), key=lambda path: path.name == "config.json")
        for path in order[:moved]:
            path.replace(out / path.name)
        assert moved == 3 or not (out / "config.json").exists()
    with open_workspace(out, "a") as workspace:
        workspace.publish()
        workspace.publish()
    assert sorted(path.name for path in out.iterdir()) == [
        ".work",
        "README.md",
        "a.safetensors",
        "config.json",
    ]


def test_the_fingerprint_sees_recipe_and_source() -> None:
    base = fingerprint({"a": 1}, {"f": "x"})
    assert base == fingerprint({"a": 1}, {"f": "x"})
    assert len({base, fingerprint({"a": 2}, {"f": "x"}), fingerprint({"a": 1}, {"f": "y"})}) == 3


@pytest.mark.parametrize("left", [(), ("notes.txt",), ("lock", "mine")])
def test_a_work_folder_without_a_journal_makes_nothing_ours(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    (tmp_path / ".work").mkdir()
    for name in left:
        (tmp_path / ".work" / name).touch()
    (tmp_path / "README.md").write_text("somebody's")
    with pytest.raises(DataError, match="not made by dllm-convert"), open_workspace(tmp_path, "a"):
        pass
    assert (tmp_path / "README.md").read_text() == "somebody's"


def test_a_run_killed_before_its_journal_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "lock").touch()
    with open_workspace(tmp_path, "a") as workspace:
        assert workspace.journal.is_file()


@pytest.mark.parametrize("name", ["lock", "journal.json.partial", ".writable", "staged"])
def test_links_in_the_work_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    if name == "staged":
        precious.mkdir()
        (precious / "config.json").write_text("mine")
    else:
        precious.write_text("mine")
    out = tmp_path / "out"
    with open_workspace(out, "a"):
        pass
    (out / ".work" / name).unlink(missing_ok=True)
    (out / ".work" / name).symlink_to(precious)
    with pytest.raises(DataError, match="is a link"), open_workspace(out, "a"):
        pass
    kept = precious / "config.json" if name == "staged" else precious
    assert kept.read_text() == "mine"


def test_a_partial_file_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.json.partial").symlink_to(tmp_path / "precious")
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "mine"
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_work_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "journal.json").write_text('{"run": "a", "stages": []}')
    out = tmp_path / "out"
    out.mkdir()
    (out / ".work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link"), open_workspace(out, "a"):
        pass


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"run": 1}', '{"run": "a", "stages": [1]}', "\xff\xfe"]
)
def test_a_damaged_journal_is_one_sentence(tmp_path: Path, content: str) -> None:
    with open_workspace(tmp_path / "out", "a"):
        pass
    (tmp_path / "out" / ".work" / "journal.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="damaged"), open_workspace(tmp_path / "out", "a"):
        pass


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with open_workspace(source, "a"):
        pass
    (tmp_path / "alias").symlink_to(source)
    (source / "model.gguf").touch()
    for given in (source, tmp_path / "alias", source / "model.gguf", source / ".." / "source"):
        with pytest.raises(DataError, match="is the source itself"):
            check_apart(source, given)
        with pytest.raises(DataError, match="is the source itself"):
            check_apart(tmp_path / "alias", given)
    check_apart(tmp_path / "new", source)
    check_apart(source, None)


@pytest.mark.parametrize("out", ["out", "a/b/c", "../alias/out", "../source/out", "a/../out"])
def test_no_output_lies_in_the_source(out: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "deep").symlink_to(source / "below")
    for given in (source, tmp_path / "alias"):
        with pytest.raises(DataError, match=f"lies in the source .*{tmp_path / 'out'}|/c$"):
            check_apart(source / out, given)
    (source / "below").mkdir()
    with pytest.raises(DataError, match="lies in the source"):
        check_apart(tmp_path / "deep" / "out", source)
    check_apart(tmp_path / "source-mdlm", source)
    (source / "model.gguf").touch()
    check_apart(source / out, source / "model.gguf")  # Beside a single file there is room.


def test_no_source_lies_in_the_output(tmp_path: Path) -> None:
    source = tmp_path / "out" / "base"
    source.mkdir(parents=True)
    (source / "model.gguf").touch()
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "alias", tmp_path):
        for given in (source, tmp_path / "alias" / "base", source / "model.gguf"):
            with pytest.raises(DataError, match="whose files are replaced"):
                check_apart(out, given)


def test_a_file_that_is_there_under_its_name_already_leaves_nothing_staged(tmp_path: Path) -> None:
    """A base that is kept is one file by two names, which renaming would leave both."""
    out = tmp_path / "out"
    with open_workspace(out, "a") as workspace:
        (out / "model.safetensors").write_text("base")
        workspace.staged.mkdir()
        (workspace.staged / "model.safetensors").hardlink_to(out / "model.safetensors")
        (workspace.staged / "config.json").write_text("{}")
        workspace.publish()
        assert not workspace.staged.exists()
        assert (out / "model.safetensors").read_text() == "base"
        assert (out / "config.json").is_file()


@pytest.mark.parametrize("name", ["../mine.txt", "linked/mine.txt", "{mine}"])
def test_a_manifest_takes_nothing_away_outside_its_folder(tmp_path: Path, name: str) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    mine.write_text("mine")
    with open_workspace(out, "a") as workspace:
        (out / "config.json").write_text("{}")
        (out / "linked").symlink_to(tmp_path)
        (out / "old.txt").write_text("old")
        listed = {name.format(mine=mine): "", "old.txt": ""}
        (out / "dllm_convert.json").write_text(json.dumps({"files": listed}))
        workspace.staged.mkdir()
        (workspace.staged / "config.json").write_text("{}")
        workspace.publish()
    assert mine.read_text() == "mine"
    assert not (out / "old.txt").exists()
