"""Bring a source onto this disk as a folder of safetensors, tokenizer and config.

A folder of safetensors is used where it lies. A Hub commit goes into the Hub's own cache. GGUF and
pickles are converted once, keyed by the file's sha256, into `$DLLM_CONVERT_CACHE` (by default
`~/.cache/dllm-convert`); a folder appears there by rename, so one that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

from dllm_convert.adapters import get_adapter
from dllm_convert.console import Reporter
from dllm_convert.disk import writing
from dllm_convert.errors import DataError, DllmConvertError
from dllm_convert.gguf_header import read_gguf_header
from dllm_convert.safetensors_header import INDEX_FILE, SINGLE_FILE, read_weight_map
from dllm_convert.source_info import SourceInfo

PICKLE_INDEX = "pytorch_model.bin.index.json"
_CHUNK = 1 << 22
_HALF_TYPES = frozenset({"F16", "BF16"})


def cache_dir() -> Path:
    """Return the folder under which converted sources are kept."""
    configured = os.environ.get("DLLM_CONVERT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "dllm-convert"


def sha256(paths: Iterable[Path], reporter: Reporter) -> str:
    """Hash the contents of files, one after the other."""
    paths = list(paths)
    digest = hashlib.sha256()
    with reporter.task("hash", total=sum(path.stat().st_size for path in paths)) as task:
        for path in paths:
            with path.open("rb") as handle:
                while chunk := handle.read(_CHUNK):
                    digest.update(chunk)
                    task.advance(len(chunk))
    return digest.hexdigest()


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


def _dequantise(path: Path, out: Path, model_type: str, *, half: bool) -> None:
    import torch
    import transformers

    adapter = get_adapter(model_type)
    # Products of a 4-bit number and a float16 scale do not fit bfloat16; files that hold half
    # precision to begin with gain nothing from float32.
    dtype = torch.bfloat16 if half else torch.float32
    try:
        model = getattr(transformers, adapter.auto_class).from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"{path.name}: transformers cannot read it ({error})",
            hint="Take the safetensors of this model, or a GGUF file in F16 or Q8_0",
        ) from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config_path = out / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _from_gguf(path: Path, model_type: str, reporter: Reporter) -> Path:
    header = read_gguf_header(path)
    kinds = {kind for kind, shape in header.tensors.values() if len(shape) > 1}
    half = kinds <= _HALF_TYPES
    elements = sum(prod(shape) for _, shape in header.tensors.values())
    folder = cache_dir() / "gguf" / sha256([path], reporter)

    def build(partial: Path) -> None:
        with reporter.task(f"dequantise {path.name} (once, then cached)"):
            _dequantise(path, partial, model_type, half=half)

    return _cached(folder, elements * (2 if half else 4), build)


def _pickle_files(folder: Path) -> list[Path]:
    index = folder / PICKLE_INDEX
    if (folder / "pytorch_model.bin").is_file() or not index.is_file():
        return [folder / "pytorch_model.bin"]
    files = [folder / name for name in sorted(set(read_weight_map(index).values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise DataError(f"{PICKLE_INDEX} names {', '.join(missing[:3])}, which is missing")
    return files


def _load_pickle(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path.name}: not a state dict of tensors, or damaged ({reason})",
            hint="Take a safetensors version; this tool runs no code from a pickle",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise DataError(f"{path.name}: expected a mapping of names to tensors")
    return state


def _save_tensors(state: dict[str, Any], out: Path, *, keep: str) -> None:
    """Write a state dict, each tied tensor once: under the name `keep` where it has it."""
    from safetensors.torch import save_file

    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors: dict[str, Any] = {}
    for name in sorted(state, key=lambda name: (name != keep, name)):
        tensor = state[name]
        key = (tensor.data_ptr(), tuple(tensor.shape))
        # position_ids and the like are buffers that the model computes.
        if tensor.is_floating_point() and (tensor.numel() == 0 or key not in seen):
            seen[key] = name
            tensors[name] = tensor.contiguous().clone()
    save_file(tensors, out / SINGLE_FILE, metadata={"format": "pt"})


def _from_pickle(folder: Path, info: SourceInfo, reporter: Reporter) -> Path:
    weights = _pickle_files(folder)
    others = [folder / name for name in info.files if not name.startswith("pytorch_model")]
    digest = sha256([*weights, *others], reporter)

    def build(partial: Path) -> None:
        with reporter.task("convert the pickle to safetensors (once, then cached)"):
            state: dict[str, Any] = {}
            for path in weights:
                state |= _load_pickle(path)
            _save_tensors(state, partial, keep=get_adapter(info.model_type).embedding)
            for path in others:
                target = partial / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)

    needed = sum(path.stat().st_size for path in weights)
    return _cached(cache_dir() / "pickle" / digest, needed, build)


def _from_hub(info: SourceInfo, reporter: Reporter) -> Path:
    from huggingface_hub import snapshot_download

    from dllm_convert.hub_errors import hub_errors

    repo_id = str(info.repo_id)
    reporter.line(f"download {repo_id} at {info.revision}")
    with hub_errors(repo_id, info.revision):
        return Path(
            snapshot_download(repo_id, revision=info.revision, allow_patterns=list(info.files))
        )


def materialise(info: SourceInfo, reporter: Reporter) -> Path:
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
        return folder
    return _from_pickle(folder, info, reporter)
