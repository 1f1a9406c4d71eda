"""Go on with a finished checkpoint: its weights are trained on, and its folder is replaced at last.

The finished checkpoint takes the place of the untrained conversion. All else is a run like any
other: until its new files are whole the old ones stay, and a kill loses nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.common.copying import sha256_file
from dllm_convert.common.counts import LARGEST_SEED
from dllm_convert.common.differences import differences
from dllm_convert.common.diffusion_section import LEARNT, NEIGHBOURS_FILE
from dllm_convert.common.disk import link
from dllm_convert.common.manifest import (
    MANIFEST_FILE,
    WRITTEN_LAST,
    changed_files,
    hash_files,
    read_manifest,
)
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.modeling.bundle import CODE_FILES
from dllm_convert.pipeline.results import Adapted
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.folder import LICENCE_FILES, SMALL_FILES, matching
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.weights.generation import write_generation

_WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
_TAKEN = (*_WEIGHTS, *SMALL_FILES, *CODE_FILES, NEIGHBOURS_FILE)


def begin(plan: ConversionPlan, out: Path) -> dict[str, Any]:
    """Return what the journal remembers of the checkpoint that is trained on.

    Whatever speaks against it is said here: after this the journal is that of the new run.

    Args:
        plan: The conversion, which has to be the one that the checkpoint came from.
        out: Folder of a finished run.

    Returns:
        `manifest`, the SHA-256 of its manifest; `history`, the trainings that it had, oldest first.

    Raises:
        DataError: The folder holds no checkpoint that training made, or one that changed.
        IncompatibleError: The checkpoint is another conversion, or of another source.
    """
    manifest = read_manifest(out)
    measured = manifest.get("measurements") or {}
    train = measured.get("train")
    if not isinstance(train, Mapping):
        raise DataError(
            f"{out} was converted without training, so there is no training to go on with",
            hint="Train it with another --out",
        )
    _check_same(plan, out, manifest)
    _check_source(plan, out, manifest.get("source") or {})
    names = ("method", "steps", "tokens", "seconds", "final_loss")
    entry = {name: train[name] for name in names if name in train}
    entry |= {name: manifest.get(name) for name in ("created", "dllm_convert")}
    entry["nelbo_after"] = measured.get("nelbo_after")
    return {
        "manifest": sha256_file(out / MANIFEST_FILE),
        "history": [*(manifest.get("history") or ()), entry],
    }


def _check_same(plan: ConversionPlan, out: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest.get("files") or {}
    wrong = changed_files(out, files)
    if wrong:
        name = min(wrong)
        raise DataError(
            f"{out / name} {wrong[name]}: only what was verified is trained on",
            hint="Put the file back, or give another --out",
        )
    config = load_json_object(out / "config.json")
    known = _without_learnt({key: config.get(key) for key in plan.config_updates})
    asked = _without_learnt(plan.config_updates)
    if known != asked:
        raise IncompatibleError(
            f"{out} holds another conversion{differences(known, asked)}",
            hint="Give the options that it was made with, or another --out",
        )


def _without_learnt(updates: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a conversion writes into a config, but for what its training has learnt since."""
    section = updates.get("diffusion")
    if not isinstance(section, Mapping):
        return dict(updates)
    left = {name: value for name, value in section.items() if name not in LEARNT}
    return {**updates, "diffusion": left}


def _check_source(plan: ConversionPlan, out: Path, recorded: Mapping[str, Any]) -> None:
    """Check that the source is the one that was converted: the manifest goes on naming it."""
    source, path = plan.source, plan.source.path
    if dict(recorded.get("fingerprint") or {}) == dict(source.fingerprint):
        return
    if path is not None and path.is_dir():
        files = {
            name: digest
            for name, digest in (recorded.get("files") or {}).items()
            if name.endswith((".safetensors", ".json"))
        }
        other = bool(changed_files(path, files))
    else:
        other = recorded.get("repo_id") != source.repo_id
    if other:
        raise IncompatibleError(
            f"{out} was converted from {recorded.get('given')}, and {source.given} is not that",
            hint="Give the source that it was made from, or another --out",
        )


def seeded_anew(recipe: Recipe, extends: Mapping[str, Any]) -> Recipe:
    """Return the recipe with another seed: the rows and masks of before are not repeated."""
    seed = (recipe.training.seed + len(extends["history"])) % (LARGEST_SEED + 1)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})})


def take_over(plan: ConversionPlan, out: Path, target: Path) -> Adapted:
    """Lay the finished checkpoint where a run has its untrained conversion.

    Args:
        plan: The conversion, which has to be the one that the checkpoint came from.
        out: Folder of the finished checkpoint; weights are linked, nothing is written there.
        target: New folder.

    Returns:
        What the stage `adapt` records.

    Raises:
        DataError: A file of the checkpoint is not what its manifest says.
        IncompatibleError: The checkpoint is another conversion.
    """
    from dllm_convert.modeling.published.gated import ADAPTER_CONFIG, ADAPTER_FOLDER

    manifest = read_manifest(out)
    _check_same(plan, out, manifest)
    files = manifest.get("files") or {}
    target.mkdir(parents=True)
    wanted = [*_TAKEN, *LICENCE_FILES]
    if plan.recipe.training.keeps_base:
        wanted.append(f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}")
    for name in matching((n for n in files if n not in WRITTEN_LAST), wanted):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        place = link if matching([name], _WEIGHTS) else shutil.copyfile
        place(out / name, target / name)
    write_generation(plan, target)
    return Adapted(
        tensors_changed=list(plan.tensors_changed),
        source_files=dict((manifest.get("source") or {}).get("files") or {}),
        files=hash_files(target),
    )
