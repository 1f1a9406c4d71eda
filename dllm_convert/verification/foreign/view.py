"""A third-party checkpoint as this package would have written it, so that every probe can read it.

The view is a folder of links to the weights and the tokenizer files, beside a config in our own
terms. Only where tensors have other names are the files written anew: a header and the same bytes.
Nothing of the folder's code is in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_convert.adapters import Adapter, get_adapter
from dllm_convert.common.json_files import write_config
from dllm_convert.errors import DataError
from dllm_convert.source.folder import file_names, matching
from dllm_convert.source.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    encode_header,
    load_json_object,
    read_checkpoint,
)
from dllm_convert.source.tokenizer_files import SIDE_FILES, VOCABULARY_FILES
from dllm_convert.verification.foreign.claim import Claim
from dllm_convert.verification.foreign.layout import ForeignLayout

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (*VOCABULARY_FILES, *SIDE_FILES, "additional_chat_templates/*.jinja")
_STAND_IN = "llama"
"""Family whose names a layout gets that no class computes; no model of it is ever loaded."""


def stand_in(layout: ForeignLayout, *, unmapped: bool) -> Adapter:
    """Return the adapter under which a layout's headers and tokens are read.

    Args:
        layout: The layout.
        unmapped: Whether this checkpoint keeps its own names.
    """
    if layout.family is not None and not unmapped:
        return get_adapter(layout.family)
    return replace(get_adapter(_STAND_IN), embedding=layout.embedding)


def stock_config(
    layout: ForeignLayout, adapter: Adapter, config: Mapping[str, Any], stated: Claim
) -> dict[str, Any]:
    """Return config.json in this package's terms.

    Args:
        layout: The layout it is of.
        adapter: The family that computes it.
        config: Its own config.json.
        stated: What it claims.
    """
    fields = layout.stock_config(config)
    for key in ("auto_map", "layer_types", "is_causal"):
        fields.pop(key, None)
    # Its own code opens every layer, whatever window the config still carries from its base.
    fields |= adapter.window.overrides if adapter.window else {}
    claim = stated.claim
    own = {
        "model_type": adapter.model_type,
        "architectures": [adapter.diffusion_class],
        "is_causal": False,
        "mask_token_id": claim.mask_token_id,
        "block_size": claim.block_size,
        "diffusion": claim.as_dict(),
    }
    return fields | own


def build_view(
    view: Path,
    folder: Path,
    config: Mapping[str, Any],
    stated: Claim,
    layout: ForeignLayout,
    *,
    rename: bool,
) -> None:
    """Write a view of a checkpoint into an empty folder.

    Args:
        view: Empty folder.
        folder: The checkpoint.
        config: Its config.json, in this package's terms.
        stated: What it claims.
        layout: Its layout.
        rename: Whether tensors get their stock names.

    Raises:
        DataError: A file of the checkpoint cannot be read.
        OSError: The disk is full.
    """
    write_config(view / "config.json", config)
    write_config(view / "generation_config.json", _generation(folder, config))
    _link_weights(view, folder, layout, rename=rename)
    for name in matching(file_names(folder), _TOKENIZER_FILES):
        if name != TOKENIZER_CONFIG:
            (view / name).parent.mkdir(exist_ok=True)
            _link(view / name, folder / name)
    write_config(view / TOKENIZER_CONFIG, _tokenizer_config(folder, stated, layout))


def _link(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target.resolve())
    except OSError:
        shutil.copyfile(target, link)


def _optional(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}


def _generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the ids of the generation config; its sampler's settings mean nothing here."""
    own = _optional(folder / "generation_config.json")
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    fields = {name: config[name] for name in names if config.get(name) is not None}
    return fields | {name: own[name] for name in names if own.get(name) is not None}


def _tokenizer_config(folder: Path, stated: Claim, layout: ForeignLayout) -> dict[str, Any]:
    """Name a stock tokenizer class, and the mask token where the tokenizer only contains it."""
    settings = _optional(folder / TOKENIZER_CONFIG)
    brought_code = settings.pop("auto_map", None) is not None
    if brought_code and layout.tokenizer_class:
        settings["tokenizer_class"] = layout.tokenizer_class
    elif brought_code and (folder / "tokenizer.json").is_file():
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if not settings.get("mask_token") and stated.mask_text == layout.mask_text:
        settings["mask_token"] = layout.mask_text
    return settings


def _link_weights(view: Path, folder: Path, layout: ForeignLayout, *, rename: bool) -> None:
    try:
        headers = read_checkpoint(folder) if rename and layout.renames else {}
    except DataError:
        headers = {}  # the probes of the files say what is broken
    if headers:
        for file, header in headers.items():
            _rewrite(view / file, folder / file, header, layout)
        if SINGLE_FILE not in headers:
            index = load_json_object(folder / INDEX_FILE)
            names = {layout.stock_name(n): file for n, file in index["weight_map"].items()}
            write_config(view / INDEX_FILE, {**index, "weight_map": names})
        return
    for name in matching(file_names(folder), ("*.safetensors", INDEX_FILE)):
        _link(view / name, folder / name)


def _rewrite(target: Path, source: Path, header: Header, layout: ForeignLayout) -> None:
    """Write a safetensors file with stock names; shapes, types and bytes stay."""
    entries = {
        layout.stock_name(name): (entry.dtype, entry.shape, entry.end - entry.start)
        for name, entry in header.entries.items()
    }
    if len(entries) < len(header.entries):
        raise DataError(f"{source.name}: two tensors would go by the same stock name")
    with source.open("rb") as handle, target.open("wb") as out:
        out.write(encode_header(entries, header.metadata))
        handle.seek(header.data_start)
        shutil.copyfileobj(handle, out, 1 << 22)
