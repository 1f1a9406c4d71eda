"""Cut the places of this machine out of a folder that is going to be published."""

from __future__ import annotations

from pathlib import Path

from dllm_convert.common.copying import sha256_file
from dllm_convert.common.foreign_files import read_text
from dllm_convert.common.manifest import MANIFEST_FILE, RECIPE_FILE, read_manifest, write_manifest
from dllm_convert.common.redaction import public
from dllm_convert.recipe import yaml_text as recipe_yaml


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
