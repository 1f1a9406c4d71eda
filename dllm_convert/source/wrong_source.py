"""What is given for a checkpoint and is none: each cause with its own way out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from pathlib import Path

from dllm_convert.errors import DataError

_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_KINDS = {
    "pdf": "a PDF document",
    "doc": "a text document",
    "docx": "a text document",
    "zip": "an archive",
    "tar": "an archive",
    "gz": "an archive",
    "tgz": "an archive",
    "zst": "an archive",
    "7z": "an archive",
    "onnx": "an ONNX graph",
    "h5": "weights of TensorFlow",
    "msgpack": "weights of Flax",
    "txt": "text",
    "md": "text",
    "jsonl": "text",
    "parquet": "text",
    "csv": "text",
    "safetensors": "one file of weights",
    "bin": "one file of weights",
    "pt": "one file of weights",
    "pth": "one file of weights",
    "ckpt": "one file of weights",
    "json": "one file of a checkpoint",
}
_ADVICE = {
    "an archive": "Unpack it, and give the folder",
    "text": "Text to train on goes to --data; give the checkpoint here",
    "one file of weights": "Give the folder that holds it",
    "one file of a checkpoint": "Give the folder that holds it",
}
_OTHER_WEIGHTS = (
    ("*.gguf", "weights as GGUF", "Give the path of one of its .gguf files"),
    ("consolidated*", "weights as their vendor trained them", "Take the transformers version"),
    ("*.onnx", "an ONNX graph", "Take the safetensors version"),
    ("tf_model*.h5", "weights of TensorFlow", "Take the safetensors version"),
    ("flax_model*.msgpack", "weights of Flax", "Take the safetensors version"),
    ("*.pth", "weights that torch saved", "Write them with save_pretrained of transformers"),
    ("*.pt", "weights that torch saved", "Write them with save_pretrained of transformers"),
)
MERGE = "merge it into its base (merge_and_unload of PEFT), and give the merged model"


def wrong_file(path: Path) -> DataError:
    """Return the error for a file that is neither a folder nor GGUF."""
    what = _KINDS.get(path.suffix.lower().removeprefix("."))
    named = f", {what}" if what else ""
    return DataError(
        f"{path} is a file{named}, expected a folder with config.json or a .gguf file",
        hint=_ADVICE.get(what or "", "Give the folder that holds config.json beside the weights"),
    )


def no_config(where: str, names: Collection[str], nearby: str | None) -> DataError:
    """Return the error for a place that has no config.json.

    Args:
        where: The folder or repository.
        names: Names of its files.
        nearby: A folder near it that has one, None if there is none.
    """
    hint = "Give the folder that holds config.json beside the weights"
    if nearby is not None:
        hint = nearby
    elif "adapter_config.json" in names:
        hint = f"It holds an adapter: {MERGE}"
    elif "model_index.json" in names:
        hint = "It holds a pipeline of diffusers, which makes pictures: give a language model"
    else:
        other = _other_weights(names)
        if other:
            hint = f"It holds {other[0]}: {other[1][0].lower()}{other[1][1:]}"
    return DataError(
        f"no config.json in {where}, expected a folder written by save_pretrained", hint=hint
    )


def no_weights(where: str, names: Collection[str]) -> DataError:
    """Return the error for a checkpoint without weights that transformers loads.

    Args:
        where: The folder or repository.
        names: Names of its files.
    """
    expected = "found neither model.safetensors nor model.safetensors.index.json"
    shards = {name: found for name in names if (found := _SHARD.fullmatch(name))}
    if shards:
        return _unindexed(where, shards)
    if any(name.startswith("adapter_") for name in names):
        return DataError(
            f"no weights in {where} but those of an adapter: {expected}",
            hint=f"It holds an adapter: {MERGE}",
        )
    other = _other_weights(names)
    if other:
        return DataError(f"no weights in {where} but {other[0]}: {expected}", hint=other[1])
    single = sorted(name for name in names if name.endswith(".safetensors"))
    if single:
        return DataError(
            f"no weights in {where} under a name that transformers loads, but {single[0]}: "
            f"{expected}",
            hint="If it holds the whole model under transformers' names, rename it to "
            "model.safetensors"
            if len(single) == 1
            else "Save the model with save_pretrained, which writes one of them",
        )
    return DataError(
        f"no weights in {where}: {expected}",
        hint="Download the weights too, or save the model with save_pretrained",
    )


def _unindexed(where: str, shards: Collection[str]) -> DataError:
    """Return the error for shards whose index is missing."""
    first = sorted(shards)[0]
    found = _SHARD.fullmatch(first)
    stem, total, kind = (found[1], int(found[3]), found[4]) if found else ("model", 0, "")
    whole = f"{stem}.{kind}"
    if total == 1:
        return DataError(
            f"the weights in {where} are the only shard, {first}, and no index names it",
            hint=f"Rename it to {whole}",
        )
    return DataError(
        f"the weights in {where} are {len(shards)} of {total} shards ({first}, ...), and the index "
        f"that says which tensor is where is missing: {whole}.index.json",
        hint=f"Download {whole}.index.json too",
    )


def _other_weights(names: Collection[str]) -> tuple[str, str] | None:
    """Return what weights of another format are, and what to do; None if there are none."""
    for pattern, what, advice in _OTHER_WEIGHTS:
        found = sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))
        if found:
            return f"{what} ({found[0]})", advice
    return None
