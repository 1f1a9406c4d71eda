"""A manifest is checked by what it does not list, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planting import edit_tensors

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import hash_files, listing_faults
from dllm_convert.verification import verify_checkpoint
from dllm_convert.verification.bytes import verify_folder

Damage = Callable[[Path, dict[str, Any]], None]


def unlisted(name: str) -> Damage:
    def add(folder: Path, manifest: dict[str, Any]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x = 1\n")

    return add


def without_its_line(folder: Path, manifest: dict[str, Any]) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    del manifest["files"]["model.safetensors"]


def emptied(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.clear()


def changed(**entries: Any) -> Damage:
    def change(folder: Path, manifest: dict[str, Any]) -> None:
        manifest.update(entries)

    return change


DAMAGES: dict[str, Damage] = {
    "emptied": emptied,
    "another version": changed(format_version=99),
    "version true": changed(format_version=True),
    "no version": changed(format_version=None),
    "files a list": changed(files=["model.safetensors"]),
    "no files": changed(files={}),
    "no digests": changed(files={"config.json": None}),
    "weights without their line": without_its_line,
    "a stray program": unlisted("extra.py"),
    "a program below": unlisted("sub/extra.py"),
    "a pickle": unlisted("pytorch_model.bin"),
    "other weights": unlisted("model-00001-of-00002.safetensors"),
    "an adapter": unlisted("adapter_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_the_manifest_does_not_cover_fails(
    converted: Callable[..., Any], damage: Damage
) -> None:
    folder = converted("llama", "bd3lm").folder
    manifest: dict[str, Any] = {"format_version": 1, "files": hash_files(folder)}
    path = folder / "dllm_convert.json"
    path.write_text(json.dumps(manifest))
    assert listing_faults(folder, manifest) == {}
    assert verify_folder(folder, None, Reporter(quiet=True)).passed
    damage(folder, manifest)
    path.write_text(json.dumps(manifest))
    light = verify_folder(folder, None, Reporter(quiet=True))
    whole = verify_checkpoint(folder, groups=["files"], untrained=True)
    for report in (light, whole):
        assert [p.name for p in report.probes if p.name == "hashes" and p.passed is False]


@pytest.mark.parametrize("name", ["notes.md", "picture.png", "LICENSE.extra"])
def test_what_a_person_lays_beside_is_fine(converted: Callable[..., Any], name: str) -> None:
    folder = converted("llama", "bd3lm").folder
    manifest = {"format_version": 1, "files": hash_files(folder)}
    (folder / name).write_text("words")
    assert listing_faults(folder, manifest) == {}
