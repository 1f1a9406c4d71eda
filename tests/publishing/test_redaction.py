"""What goes up names no folder of the machine it was made on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from card_cases import llama_bd3lm

from dllm_convert.common.manifest import changed_files, hash_files, read_manifest, write_manifest
from dllm_convert.common.redaction import last_part, public, without_paths
from dllm_convert.publishing.redaction import redact_folder
from dllm_convert.recipe import yaml_text as recipe_yaml
from dllm_convert.recipe.loading import load_recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no paths: 3/4 of 1.5e-05, n/a, and/or", "no paths: 3/4 of 1.5e-05, n/a, and/or"),
        ("see https://x.org/a/b", "see https://x.org/a/b"),
        ("/home/me/x.json is missing", "x.json is missing"),
        ("in '/home/me/x y/z.json'", "in 'z.json'"),
        ("at C:\\Users\\me\\x.json", "at x.json"),
        ("~/me/x", "x"),
        ("org/model", "org/model"),
        ("a (/tmp/x/y) b", "a (y) b"),
        ("<|/s|>", "<|/s|>"),
        ("</s> and <s/>", "</s> and <s/>"),
        ("\\\\server\\share\\x.json", "x.json"),
        ("from ../me/x.json", "from x.json"),
        ("layers.0/1", "layers.0/1"),
    ],
)
def test_paths_in_sentences(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_last_part() -> None:
    assert [last_part(p) for p in ("a/b", "a\\b\\", "/a/b//", "b", "")] == ["b", "b", "b", "b", ""]


def test_everything_but_the_sample(tmp_path: Path) -> None:
    manifest = llama_bd3lm()
    manifest["source"]["given"] = manifest["recipe"]["source"] = "/home/somebody/base"
    manifest["recipe"]["data"]["source"] = "/home/somebody/a.txt,/home/somebody/b/*.md"
    manifest["stages"] = [{"name": "materialise", "result": {"folder": "/home/somebody/.cache/x"}}]
    manifest["sample"]["text"] = " look into /usr/share/doc"
    shown = public(manifest)
    assert "somebody" not in json.dumps(shown)
    assert shown["recipe"]["data"]["source"] == "a.txt,*.md"
    assert shown["stages"][0]["result"]["folder"] == "x"
    assert shown["sample"] == manifest["sample"]
    assert shown["measurements"] == manifest["measurements"]
    assert shown["versions"] == manifest["versions"]
    assert public(shown) == shown


def test_a_folder_before_it_goes_up(tmp_path: Path) -> None:
    checkpoint, staged = tmp_path / "checkpoint", tmp_path / "staged"
    checkpoint.mkdir()
    staged.mkdir()
    recipe = {"source": "/home/somebody/base", "target": "mdlm", "data": {"source": "/x/y/a.txt"}}
    (checkpoint / "recipe.yaml").write_text(recipe_yaml.dump(recipe))
    write_manifest(
        checkpoint, llama_bd3lm() | {"format_version": 1, "files": hash_files(checkpoint)}
    )
    for name in ("recipe.yaml", "dllm_convert.json"):
        (staged / name).hardlink_to(checkpoint / name)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    redact_folder(staged)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert "somebody" not in (staged / "recipe.yaml").read_text()
    loaded = load_recipe(str(staged / "recipe.yaml"), overrides={})
    assert (loaded.source, loaded.data.source) == ("base", "a.txt")
    assert changed_files(staged, read_manifest(staged)["files"]) == {}
