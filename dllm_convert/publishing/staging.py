"""Put together exactly the files that are to be published."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.disk import link
from dllm_convert.common.manifest import (
    MANIFEST_FILE,
    WRITTEN_LAST,
    checkpoint_files,
    read_manifest,
    write_manifest,
)
from dllm_convert.errors import DataError
from dllm_convert.publishing.reshard import WEIGHT_PATTERNS, needs_reshard, reshard

TRAVELLING = ("*.md", "*.png", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files a person may lay beside the checkpoint, not below it; anything else is not published."""


def published_names(folder: Path, recorded: Iterable[str]) -> list[str]:
    """Return the names of the files that are published, with forward slashes.

    Args:
        folder: A checkpoint.
        recorded: Names of the files its manifest lists.

    Raises:
        DataError: There is a file that is neither recorded nor of a kind people add.
    """
    known = {*recorded, *WRITTEN_LAST}
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        place = Path(root).relative_to(folder)
        found += [(place / name).as_posix() for name in files if not _hidden(name)]
    strange = [
        name
        for name in found
        if name not in known and ("/" in name or not any(fnmatch(name, p) for p in TRAVELLING))
    ]
    if strange:
        raise DataError(
            f"{folder} holds {min(strange)}, which its manifest does not list"
            + (f", and {len(strange) - 1} more such files" if len(strange) > 1 else ""),
            hint="Move it out of the folder: only what was verified is published",
        )
    return sorted(found)


def _hidden(name: str) -> bool:
    # Work state, caches of editors and of Python, and secrets such as .env.
    return name.startswith(".") or name == "__pycache__" or name.endswith((".partial", ".pyc"))


def stage(folder: Path, out: Path, reporter: Reporter, *, max_shard_size: int | None) -> None:
    """Build the folder that goes up.

    Files are linked, not copied, and compared with the hashes of the manifest: what changed
    since it was verified is not published.

    Args:
        folder: A checkpoint.
        out: New folder.
        reporter: Progress.
        max_shard_size: Bytes per weight file; None leaves the files as they are.

    Raises:
        DataError: A file is missing, differs from the manifest, or is not known to it.
    """
    manifest = read_manifest(folder)
    recorded: dict[str, str] = dict(manifest.get("files") or {})
    if not recorded:
        raise DataError(
            f"the manifest of {folder} lists no files",
            hint="Give a folder that dllm-convert run finished",
        )
    names = published_names(folder, recorded)
    missing = sorted(set(recorded) - set(names))
    if missing:
        raise DataError(
            f"{folder} lacks {missing[0]}, which its manifest lists", hint="Convert it again"
        )
    out.mkdir(parents=True)
    limit = max_shard_size
    split = limit is not None and needs_reshard(folder, limit)
    with reporter.task("compare with the manifest", total=len(names)) as task:
        for name in names:
            check_recorded(folder, name, recorded)
            if not (split and is_weight(name)):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                link(folder / name, out / name)
            task.advance()
    if limit is not None and split:
        reshard(folder, out, limit)
        recorded = {name: digest for name, digest in recorded.items() if not is_weight(name)}
    # Hashes that were just compared are not computed again.
    files = {
        name: recorded.get(name) or sha256_file(out / name)
        for name in checkpoint_files(out)
        if name not in WRITTEN_LAST
    }
    (out / MANIFEST_FILE).unlink()
    write_manifest(out, manifest | {"files": files})


def is_weight(name: str) -> bool:
    """Whether a file at the top of a checkpoint holds weights or lists them."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)


def check_recorded(folder: Path, name: str, recorded: Mapping[str, str]) -> None:
    """Refuse a file that differs from the manifest.

    Raises:
        DataError: It was changed.
    """
    if name in recorded and sha256_file(folder / name) != recorded[name]:
        raise DataError(
            f"{name} of {folder} was changed after it was verified",
            hint="Put the file back, or convert again",
        )
