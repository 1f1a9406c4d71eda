"""The manifest `dllm_convert.json`: where a checkpoint comes from, what was done, what it holds."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from dllm_convert.common.copying import sha256_file, sha256_files
from dllm_convert.common.json_files import load_json_object, write_json
from dllm_convert.common.manifest_form import (
    MANIFEST_VERSION,
    check_form,
    check_version,
    is_this_version,
)
from dllm_convert.common.nearest import no_folder
from dllm_convert.common.work_folder import WORK
from dllm_convert.errors import DataError

MANIFEST_FILE = "dllm_convert.json"
EXPORT_FILE = "dllm_export.json"
"""What stands in its place in an export for an engine."""
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
REPORT_FILE = "report.html"
WRITTEN_LAST = (MANIFEST_FILE, CARD_FILE, REPORT_FILE)
"""Files that say what the others are: written after them, not hashed among them."""
_LOADED = frozenset(
    {
        *(".safetensors", ".json", ".py", ".model", ".txt", ".jinja", ".yaml", ".gguf"),
        *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack"),
        *(".so", ".pyc", ".pyd", ".dll", ".dylib", ".sh", ".js", ".exe"),
    }
)
"""Suffixes of what libraries load or run; words and pictures a person may lay beside."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")


def read_manifest(folder: Path, *, any_version: bool = False) -> dict[str, Any]:
    """Read the manifest of a converted checkpoint.

    Args:
        folder: The checkpoint.
        any_version: Whether one of another version is read too: a verification has a probe that
            says so, beside everything else it finds.

    Raises:
        DataError: There is none, it is not a JSON object or of another version, or something in it
            is of another kind.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise no_folder(folder)
    if not path.exists():
        raise DataError(
            f"{folder} has no {MANIFEST_FILE}, so nothing is known of how it was made",
            hint="Give a folder that dllm-convert run wrote",
        )
    content = load_json_object(path)
    if not any_version:
        check_version(content, path)
    check_form(content, path)
    return content


def refuse_other_version(folder: Path) -> None:
    """Refuse a checkpoint whose manifest is of another version, before any work is done on it.

    Raises:
        DataError: It is, or it cannot be read. A folder without a manifest passes.
    """
    if (folder / MANIFEST_FILE).exists():
        read_manifest(folder)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the manifest whole or not at all, and return its path."""
    path = folder / MANIFEST_FILE
    write_json(path, dict(manifest))
    return path


def git_blob(path: Path) -> str:
    """Return the id git gives a file's content, in hexadecimal."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def record_card(folder: Path) -> None:
    """Remember in the manifest what the generated README.md was, to tell a person's edits later."""
    path = folder / CARD_FILE
    card = {"sha256": sha256_file(path), "blob": git_blob(path)}
    write_manifest(folder, read_manifest(folder) | {"card": card})


def checkpoint_files(folder: Path) -> list[str]:
    """Return the names of all files under `folder`, work state left out, sorted.

    Names are relative to the folder, with forward slashes.
    """
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and WORK not in path.relative_to(folder).parts
    )


def hash_files(folder: Path, exclude: Iterable[str] = ()) -> dict[str, str]:
    """Return the SHA-256 of every file under `folder`, work state left out.

    Args:
        folder: Checkpoint folder.
        exclude: Names to leave out, relative to the folder, with forward slashes.

    Returns:
        Name relative to the folder, with forward slashes, to hexadecimal digest.
    """
    skipped = set(exclude)
    return sha256_files({n: folder / n for n in checkpoint_files(folder) if n not in skipped})


def changed_files(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """Compare files with the hashes of a manifest.

    Args:
        folder: Checkpoint folder.
        hashes: File name to SHA-256, as `hash_files` returns it.

    Returns:
        File name to what is wrong with it; empty if everything is as recorded.
    """
    wrong: dict[str, str] = {}
    present: dict[str, Path] = {}
    for name in hashes:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            wrong[name] = "lies outside the folder"
        elif not (folder / name).is_file():
            wrong[name] = "is missing"
        else:
            present[name] = folder / name
    for name, found in sha256_files(present).items():
        if found != hashes[name]:
            wrong[name] = f"has sha256 {found[:12]}…, recorded {str(hashes[name])[:12]}…"
    return wrong


def listing_faults(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what a manifest itself lacks: hashes prove nothing of a file that is not listed.

    Args:
        folder: Checkpoint folder.
        manifest: Content of its dllm_convert.json.

    Returns:
        Place to what is wrong with it; empty if every file that is loaded is listed.
    """
    version, files = manifest.get("format_version"), manifest.get("files")
    wrong: dict[str, str] = {}
    if not is_this_version(version):
        wrong["format_version"] = f"is {version!r}, expected {MANIFEST_VERSION}"
    hashes = files if isinstance(files, Mapping) else {}
    if not hashes:
        wrong["files"] = "lists no files"
    wrong |= {
        f"files: {name}": "has no SHA-256"
        for name, digest in hashes.items()
        if not (isinstance(digest, str) and _SHA256.fullmatch(digest))
    }
    for name in checkpoint_files(folder):
        listed = name in hashes or name in WRITTEN_LAST
        if not listed and PurePosixPath(name).suffix.lower() in _LOADED:
            wrong[name] = "is not listed"
    return wrong


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
