"""Files that are not what their names say: pipes, devices, links out, and files without an end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.foreign_files import check_file, check_inside, read_text
from dllm_convert.errors import DataError, DllmConvertError, IncompatibleError
from dllm_convert.planning.launch import Launch, read_config
from dllm_convert.recipe.loading import data_dir, load_recipe
from dllm_convert.recipe.yaml_text import parse_mapping, parse_value
from dllm_convert.source.inspect import inspect_source

Sources = Callable[..., Path]
SPARSE = 100 << 30


def sparse(path: Path) -> None:
    """Make a file of 100 GB that takes no room."""
    with path.open("wb") as file:
        file.truncate(SPARSE)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", "README.md"])
def test_a_link_out_of_the_source_is_refused(source_factory: Sources, name: str) -> None:
    source = source_factory("llama")
    secret = source.parent / "secret"
    kept = source / name
    secret.write_bytes(kept.read_bytes() if kept.exists() else b"key")
    kept.unlink(missing_ok=True)
    kept.symlink_to(secret)
    with pytest.raises(DataError, match="link that leads out") as caught:
        inspect_source(str(source))
    assert str(secret) in str(caught.value)


def test_links_inside_the_source_and_into_the_hubs_cache_are_fine(
    source_factory: Sources, tmp_path: Path
) -> None:
    source = source_factory("llama")
    (source / "NOTICE").symlink_to(source / "config.json")
    inspect_source(str(source))
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        if path.is_file() and not path.is_symlink():
            (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert inspect_source(str(snapshot)).model_type == "llama"
    (tmp_path / "linked").symlink_to(source)
    inspect_source(str(tmp_path / "linked"))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "README.md"]
)
def test_a_file_without_an_end_is_looked_at_before_it_is_read(
    source_factory: Sources, name: str
) -> None:
    source = source_factory("llama")
    (source / name).unlink(missing_ok=True)
    sparse(source / name)
    with pytest.raises(DataError, match=f"{SPARSE:,} bytes, expected at most"):
        inspect_source(str(source))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md", "LICENSE"])
def test_a_pipe_is_not_waited_for(source_factory: Sources, name: str) -> None:
    source = source_factory("llama")
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    try:
        inspect_source(str(source))
    except DllmConvertError:
        return
    assert name in ("README.md", "LICENSE")


def test_pipes_and_devices_as_recipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    sparse(tmp_path / "large.yaml")
    for name, said in (("pipe", "a named pipe"), ("zero", "a device"), ("large", "bytes")):
        with pytest.raises(DataError, match=said):
            load_recipe(str(tmp_path / f"{name}.yaml"), overrides={})


def test_the_functions_themselves(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ä" * 10)
    assert read_text(tmp_path / "a") == "ä" * 10
    with pytest.raises(DataError, match="at most 19"):
        read_text(tmp_path / "a", 19)
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(DataError, match="UTF-8"):
        read_text(tmp_path / "b")
    with pytest.raises(DataError, match="a folder"):
        check_file(tmp_path)
    (tmp_path / "c").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="leads out"):
        check_inside(tmp_path, ["a", "c"])


ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIASES, "alias"),
        ("a: &a [*a]", "alias"),
        ("a: " + "[" * 5000 + "]" * 5000, "levels"),
        ("\n".join("  " * n + f"k{n}:" for n in range(2000)), "levels"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: !!binary é", "tag"),
        ("a: !!timestamp x", "tag"),
        ("a: !!python/object:os.system {}", "tag"),
        ('a: "\\ud800"', "half a character"),
    ],
)
def test_recipes_that_grow_are_refused_before_anything_is_built(text: str, said: str) -> None:
    for parse in (parse_mapping, parse_value):
        with pytest.raises(IncompatibleError, match=said):
            parse(text, "r.yaml")


def test_a_recipe_of_aliases_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(ALIASES)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml")])
    assert done.exit_code == 3
    assert "Traceback" not in done.stderr
    assert "alias" in done.stderr


@pytest.mark.parametrize("kind", ["dangling", "pipe"])
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
)
def test_what_cannot_be_read_is_no_absence(source_factory: Sources, name: str, kind: str) -> None:
    source = source_factory("llama")
    (source / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(source / name)
    else:
        (source / name).symlink_to(source.parent / "gone")
    with pytest.raises(DataError, match=r"named pipe|where nothing is") as caught:
        inspect_source(str(source))
    assert name in str(caught.value)


def test_folders_with_a_files_name_are_left_alone(source_factory: Sources) -> None:
    source = source_factory("llama")
    (source / "LICENSES").mkdir()
    (source / "README.md").mkdir()
    inspect_source(str(source))


@pytest.mark.parametrize(("name", "fine"), [("0" * 64, True), ("key", False)])
def test_links_of_an_older_client_lead_into_its_cache(
    source_factory: Sources, tmp_path: Path, name: str, fine: bool
) -> None:
    source = source_factory("llama")
    store = tmp_path / "models--a--b"
    (store / "snapshots").mkdir(parents=True)
    (store / "blobs").mkdir()
    shutil.move(source / "model.safetensors", store / "blobs" / name)
    (source / "model.safetensors").symlink_to(store / "blobs" / name)
    if fine:
        inspect_source(str(source))
    else:
        with pytest.raises(DataError, match="leads out"):
            inspect_source(str(source))


@pytest.mark.parametrize(
    "content", ["", "- 1", "a: [", "a: !!python/object:os.system x", "[" * 5000, "a: &a [*a]", "\0"]
)
def test_a_launch_config_is_looked_at_first(tmp_path: Path, content: str) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(content)
    with pytest.raises(DllmConvertError, match=r"launch\.yaml"):
        Launch.asked(2, path, environment={})
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="named pipe"):
        Launch.asked(2, path, environment={})


def test_the_launch_configs_that_are_shipped_are_fine() -> None:
    shipped = sorted((data_dir("recipes") / "launch").glob("*.yaml"))
    assert shipped
    for path in shipped:
        read_config(path)


@pytest.mark.parametrize("name", ["README.md", "report.html", "config.json", "sample.gif"])
def test_a_page_replaces_no_file_of_a_checkpoint(source_factory: Sources, name: str) -> None:
    source = source_factory("llama")
    (source / name).write_bytes(before := b"{}")
    ways = (["verify", str(source), "--report"], ["sample", str(source), "--record"])
    for way in ways:
        result = CliRunner().invoke(app, [*way, str(source / name)])
        assert result.exit_code == 2, result.output
        assert (source / name).read_bytes() == before
