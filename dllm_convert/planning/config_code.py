"""What beside the weights decides which code runs: classes, own code, kernels, adapters.

Stock transformers is the measure: whatever it would do with the source is what the conversion has
to start from, or the plan says that it does not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.bundle import MODELING_MODULE
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.tokenizer_classes import is_known

_OTHER_HEADS = re.compile(
    r".*(For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)"
    r"|Reward\w*|ForTextRegression)"
)
_TOKENIZER, _WEIGHTS = "tokenizer_class", "transformers_weights"
_CODE_KEYS = re.compile(
    r"auto_map|trust_remote_code|use_kernels|kernel\w*|custom_\w+"
    r"|_?(attn|attention|experts)_implementation(_internal)?"
    r"|transformers_weights|compile_config"
)
"""Fields of a config that name code, kernels or files, or how to run: none is part of a model.

transformers itself takes `transformers_weights` out when it saves.
"""
_IMPLEMENTATIONS = frozenset(
    {
        *("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"),
        *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
    }
)
ADAPTER_FILE = "adapter_config.json"


def code_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields of config.json that name code or kernels; the output has none of them."""
    found = [key for key in config if _CODE_KEYS.fullmatch(key)]
    declared = config.get(_TOKENIZER)
    if declared is not None and not (isinstance(declared, str) and is_known(declared)):
        found.append(_TOKENIZER)
    return tuple(found)


def check_weights_named(config: Mapping[str, Any], files: Collection[str]) -> None:
    """Check that stock transformers loads the weights whose headers were read.

    Raises:
        IncompatibleError: config.json names another file.
    """
    named = config.get(_WEIGHTS)
    if named is not None and named not in files:
        raise IncompatibleError(
            f"config.json: {_WEIGHTS} names {_said(named)}, and the weights here are "
            f"{', '.join(sorted(files)[:3])}: stock transformers would load the other file",
            hint=f"Take {_WEIGHTS} out of config.json, or name the file it means model.safetensors",
        )


def check_adapter_beside(beside: Collection[str]) -> None:
    """Check that no adapter lies beside the weights: stock transformers would put it on.

    Raises:
        IncompatibleError: One does.
    """
    if ADAPTER_FILE in beside:
        raise IncompatibleError(
            f"{ADAPTER_FILE} lies beside the weights: stock transformers loads the base it names "
            "with this adapter on it, which is another model than the weights here",
            hint="Merge the adapter (merge_and_unload of PEFT) and give the merged model, or take "
            "the adapter's files out of the folder if its weights are what you mean",
        )


_CLASS = re.compile(r"\w*(?:For[A-Z]\w*|Model|Head\w*)")
"""What classes of transformers, and those written after them, are called."""


def _is_class(name: str) -> bool:
    """Whether a name is that of a class, or none that anybody would give a model."""
    return _CLASS.fullmatch(name) is not None or not name.isidentifier()


def check_class(config: Mapping[str, Any], adapter: Adapter) -> None:
    """Check that the checkpoint is of the family's language model.

    Nothing named is no contradiction. A measured family's class may have had other names before, so
    there another name is only told by `code_warnings`; so is a name that says nothing of a class,
    such as AntiBERTy: whether the weights are the family's, their names and shapes decide.

    Raises:
        IncompatibleError: It is another head on the same body, or a class of its own.
    """
    names = _architectures(config)
    if not names or _is_stock(names, config, adapter):
        return
    for name in names:
        if _OTHER_HEADS.fullmatch(name):
            raise IncompatibleError(
                f"config.json: architectures names {name}, expected {adapter.stock_class}: a model "
                "that was trained for another task does not write text",
                hint="Take the language model it was made from",
            )
    own = _own_code(config)
    if adapter.measured is None and (own or any(_is_class(name) for name in names)):
        code = f", whose code lies beside the weights (auto_map: {own})" if own else ""
        raise IncompatibleError(
            f"config.json: architectures names {_said(names[0])}{code}, expected "
            f"{adapter.stock_class}: the weights are of a model that computes otherwise, or has no "
            "language-model head",
            hint=f"Take a checkpoint of {adapter.stock_class}; if these weights are one, correct "
            "architectures in config.json",
        )


def code_warnings(source: SourceInfo, adapter: Adapter) -> tuple[str, ...]:
    """Return what to know of code that the checkpoint names and that is not run."""
    return tuple(_warnings(source.config, adapter))


def _warnings(config: Mapping[str, Any], adapter: Adapter) -> Iterator[str]:
    names, own = _architectures(config), _own_code(config)
    if own:
        yield (
            f"config.json names code of its own (auto_map: {own}): it is neither run nor copied, "
            f"and the weights are taken as {adapter.stock_class} reads them"
        )
    if names and not _is_stock(names, config, adapter):
        yield (
            f"config.json: architectures names {_said(names[0])}, and the weights are taken as "
            f"{adapter.stock_class} reads them"
        )
    for key in code_keys(config):
        value = config[key]
        if key not in ("auto_map", _WEIGHTS) and value and value not in (True, *_IMPLEMENTATIONS):
            yield f"config.json: {key} names {_said(value)}: it is neither loaded nor copied"
    if config.get("is_causal") is False and diffusion_section(config) is None:
        yield (
            "config.json says is_causal false: the source sees both sides already, and what is "
            "measured of it under a causal mask (its NLL, its picture) is not how it was trained"
        )


def _said(value: object) -> str:
    text = ascii(value).strip("'\"")
    return text if len(text) <= 60 else f"{text[:60]}…"


def _architectures(config: Mapping[str, Any]) -> list[str]:
    listed = config.get("architectures")
    names = listed if isinstance(listed, list) else [listed]
    # FSDP2 of accelerate renames the class it wraps, and old files spell Llama otherwise.
    return [name.removeprefix("FSDP") for name in names if isinstance(name, str)]


def _is_stock(names: list[str], config: Mapping[str, Any], adapter: Adapter) -> bool:
    known = {adapter.stock_class, *adapter.also_of}
    if diffusion_section(config) is not None:
        known.add(adapter.diffusion_class)
    folded = {name.casefold() for name in known}
    return any(name.casefold() in folded for name in names)


def _own_code(config: Mapping[str, Any]) -> str | None:
    """Return the first name in `auto_map` that is code of the checkpoint's, None if there is none.

    A conversion of ours names the file that this tool writes, and writes anew.
    """
    named = config.get("auto_map")
    if not isinstance(named, Mapping):
        return None
    ours = diffusion_section(config) is not None
    for value in named.values():
        text = value[0] if isinstance(value, list) and value else value
        if isinstance(text, str) and not (ours and text.startswith(f"{MODELING_MODULE}.")):
            return _said(text)
    return None
