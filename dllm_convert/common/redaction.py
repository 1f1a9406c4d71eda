"""Keep folders of the machine a checkpoint was made on out of what is published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.common.copying import sha256_file
from dllm_convert.common.foreign_files import read_text
from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest, write_manifest
from dllm_convert.recipe import yaml_text as recipe_yaml

RECIPE_FILE = "recipe.yaml"
_SEPARATORS = re.compile(r"[/\\]")
# Spaces and brackets count as part of a name: better a word too many is cut than a folder's name
# is told. A comma does not where another path begins behind it.
_SIGN = r"(?:[\w.@+ ()\[\]{}!#%&=;^$-]|,(?!\s*(?:[/~\\]|\.{1,2}[/\\]|[A-Za-z]:)))"
_NAME = rf"[/\\]+{_SIGN}*[\w.@+*)\]}}!#%&=^$-]"
_FILE = r"(?:file:(?://[\w.-]*)?)"
_PATH = re.compile(
    rf"(?:{_FILE}|(?<![\w/\\.:~]))(?:(?:~|\.{{1,2}}|[A-Za-z]:)(?:{_NAME})+|(?:{_NAME}){{2,}})"
    r"[/\\]?"
)


def last_part(path: str) -> str:
    """Return the last part of a path of any system."""
    return _SEPARATORS.split(path.rstrip("/\\"))[-1]


def without_paths(text: str) -> str:
    """Cut the paths inside a sentence down to their last part; addresses stay whole."""
    return _PATH.sub(lambda found: last_part(found[0]) or found[0], text)


def public(value: Any) -> Any:
    """Return JSON-like data with the paths in all its texts cut down; a decoded sample stays."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {key: entry if key == "sample" else public(entry) for key, entry in value.items()}
    return [public(entry) for entry in value] if isinstance(value, list | tuple) else value


def redact_folder(folder: Path) -> None:
    """Cut paths out of the manifest and the recipe of a folder that is going to be published.

    Files are replaced, never written through: they may be links to the checkpoint's own.

    Args:
        folder: Staged copy of a checkpoint.

    Raises:
        DataError: It has no manifest.
    """
    manifest = public(read_manifest(folder))
    recipe = folder / RECIPE_FILE
    if recipe.is_file() and RECIPE_FILE in (manifest.get("files") or {}):
        text = read_text(recipe)
        recipe.unlink()
        shown = public(recipe_yaml.parse_mapping(text, RECIPE_FILE))
        recipe.write_text(recipe_yaml.dump(shown), encoding="utf-8")
        manifest["files"][RECIPE_FILE] = sha256_file(recipe)
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder, manifest)
