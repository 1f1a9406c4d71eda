"""The manifest file: whole or absent, hashes that notice, names that stay inside."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.common.manifest import (
    MANIFEST_FILE,
    changed_files,
    hash_files,
    read_manifest,
    sha256_file,
    versions,
    write_manifest,
)
from dllm_convert.errors import DataError


def test_round_trip_leaves_one_file(tmp_path: Path) -> None:
    manifest = {"format_version": 1, "source": {"given": "ß"}, "verification": None}
    assert write_manifest(tmp_path, manifest) == tmp_path / MANIFEST_FILE
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_failed_write_keeps_the_old_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"format_version": 1})
    with pytest.raises(TypeError):
        write_manifest(tmp_path, {"format_version": object()})
    assert read_manifest(tmp_path) == {"format_version": 1}


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3"])
def test_broken_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(DataError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


def test_binary_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


def test_sha256_of_a_file_larger_than_a_piece(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_hashes_cover_folders_but_not_work_state(tmp_path: Path) -> None:
    for name in ("a.txt", "adapter/b.txt", ".work/c.txt", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert list(hash_files(tmp_path, exclude=("README.md",))) == ["a.txt", "adapter/b.txt"]


def test_changed_missing_and_outside_files(tmp_path: Path) -> None:
    for name in ("same", "changed", "missing"):
        (tmp_path / name).write_text(name)
    hashes = hash_files(tmp_path) | {"../up": "0" * 64, "/etc/hostname": "0" * 64}
    (tmp_path / "changed").write_text("other")
    (tmp_path / "missing").unlink()
    wrong = changed_files(tmp_path, hashes)
    assert sorted(wrong) == ["../up", "/etc/hostname", "changed", "missing"]
    assert "outside" in wrong["../up"]
    assert "missing" in wrong["missing"]


def test_versions_are_text_for_json() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "safetensors"} <= found.keys()
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": 5},
        {"source": None},
        {"plan": []},
        {"stages": {}},
        {"created": 5},
        {"versions": None},
        {"sample": 7},
        {"sample": {"text": 5}},
        {"verification": []},
        {"recipe": {"training": []}},
        {"recipe": {"training": {"lora": 1}}},
    ],
)
def test_parts_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"format_version": 1} | change))
    with pytest.raises(DataError, match=r"expected (an object|a list|a text)") as caught:
        read_manifest(tmp_path)
    assert next(iter(change)) in str(caught.value)


def test_a_manifest_without_an_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_FILE)
    with pytest.raises(DataError, match="named pipe"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()
    with (tmp_path / MANIFEST_FILE).open("wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(DataError, match="expected at most"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(DataError, match="not valid JSON"):
        read_manifest(tmp_path)
