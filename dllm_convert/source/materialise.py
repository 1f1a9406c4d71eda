"""Bring a source onto this disk as a folder of safetensors, tokenizer and config.

A folder of safetensors is used where it lies. A Hub commit goes into the Hub's own cache. GGUF and
pickles are converted once, keyed by the file's sha256, into `$DLLM_CONVERT_CACHE` (by default
`~/.cache/dllm-convert`); a folder appears there by rename, so one that exists is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from dllm_convert.adapters import get_adapter
from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_files
from dllm_convert.common.disk import writing
from dllm_convert.errors import DllmConvertError
from dllm_convert.source.from_gguf import is_half
from dllm_convert.source.from_pickle import convert_pickles, copy_others, pickle_files
from dllm_convert.source.gguf_header import read_gguf_header
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.safetensors_header import INDEX_FILE, SINGLE_FILE


@dataclass(frozen=True)
class Materialised:
    """A source on this disk.

    Attributes:
        folder: Its safetensors, config and tokenizer.
        originals: SHA-256 of the files it was made from, by name; empty where it is as it came.
    """

    folder: Path
    originals: Mapping[str, str] = field(default_factory=dict)


def cache_dir() -> Path:
    """Return the folder under which converted sources are kept."""
    configured = os.environ.get("DLLM_CONVERT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "dllm-convert"


def _hash(folder: Path, names: Iterable[str], reporter: Reporter) -> dict[str, str]:
    """Return the SHA-256 of files, name to hexadecimal digest."""
    paths = {name: folder / name for name in names}
    with reporter.task("hash", total=sum(path.stat().st_size for path in paths.values())) as task:
        return sha256_files(paths, task.advance)


def _key(hashes: Mapping[str, str]) -> str:
    """Return one name for several files with their contents."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _cached(folder: Path, needed: int, build: Callable[[Path], None]) -> Path:
    """Return `folder`, built beside itself and renamed if it does not exist yet."""
    if folder.is_dir():
        return folder
    with writing(folder, needed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}.", dir=folder.parent))
        try:
            build(partial)
            try:
                partial.rename(folder)
            except OSError:
                # Another run finished the same conversion first; its content is the same.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _from_gguf(path: Path, model_type: str, reporter: Reporter) -> Materialised:
    header = read_gguf_header(path)
    elements = sum(prod(tensor.shape) for tensor in header.tensors.values())
    hashes = _hash(path.parent, [path.name], reporter)
    folder = cache_dir() / "gguf" / hashes[path.name]

    def build(partial: Path) -> None:
        from dllm_convert.source.from_gguf import dequantise

        with reporter.task(f"dequantise {path.name} (once, then cached)"):
            dequantise(path, partial, model_type)

    needed = elements * (2 if is_half(header) else 4)
    return Materialised(_cached(folder, needed, build), hashes)


def _from_pickle(folder: Path, info: SourceInfo, reporter: Reporter) -> Materialised:
    weights = pickle_files(folder)
    others = [name for name in info.files if not name.startswith("pytorch_model")]
    hashes = _hash(folder, [*weights, *others], reporter)

    def build(partial: Path) -> None:
        keep = get_adapter(info.model_type).embedding
        with reporter.task("convert the pickle to safetensors (once, then cached)"):
            convert_pickles(folder, weights, partial, keep)
            copy_others(folder, others, partial)

    needed = sum((folder / name).stat().st_size for name in weights)
    return Materialised(_cached(cache_dir() / "pickle" / _key(hashes), needed, build), hashes)


def _from_hub(info: SourceInfo, reporter: Reporter) -> Path:
    from huggingface_hub import snapshot_download

    from dllm_convert.source.hub_errors import hub_errors

    repo_id = str(info.repo_id)
    reporter.line(f"download {repo_id} at {info.revision}")
    with hub_errors(repo_id, info.revision):
        return Path(
            snapshot_download(repo_id, revision=info.revision, allow_patterns=list(info.files))
        )


def materialise(info: SourceInfo, reporter: Reporter) -> Materialised:
    """Return a folder with the source's safetensors, config and tokenizer.

    Raises:
        DataError: A file is broken, or the disk is full.
        HubError: The download failed.
    """
    if info.kind == "gguf":
        if info.path is None:
            raise DllmConvertError(f"{info.given}: a GGUF source without a path")
        return _from_gguf(info.path, info.model_type, reporter)
    folder = info.path if info.path is not None else _from_hub(info, reporter)
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return Materialised(folder)
    return _from_pickle(folder, info, reporter)
