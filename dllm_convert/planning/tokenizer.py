"""Whether the tokenizer can be loaded at all, and without code of the checkpoint's own."""

from __future__ import annotations

from importlib.util import find_spec

from dllm_convert.errors import IncompatibleError
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.tokenizer_classes import has_class

_NEEDED = {
    "tekken.json": (("mistral_common",), "mistral"),
    "tokenizer.model": (("sentencepiece", "google.protobuf"), "sentencepiece"),
}
"""Vocabulary file to the modules that read it, and the extra that installs them."""


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check_tokenizer(source: SourceInfo) -> tuple[str, ...]:
    """Check that transformers loads the tokenizer by itself; return what to know of it.

    Raises:
        IncompatibleError: The tokenizer is code of the checkpoint's, which is not run, or a file
            whose reader is not installed.
    """
    tokenizer = source.tokenizer
    modules, extra = _NEEDED.get(tokenizer.file or "", ((), ""))
    missing = [module for module in modules if not _installed(module)]
    if missing:
        raise IncompatibleError(
            f"the only vocabulary is {tokenizer.file}, which {' and '.join(missing)} would read, "
            "and it is not installed",
            hint=f"pip install 'dllm-convert[{extra}]', or put a tokenizer.json beside the weights",
        )
    return (*_beyond(source), *_own_code(source))


def _beyond(source: SourceInfo) -> tuple[str, ...]:
    """Say which added tokens the embedding has no rows for."""
    rows = source.config.get("vocab_size")
    if not isinstance(rows, int):
        return ()
    lacking = {row: text for text, row in source.tokenizer.vocab.items() if row >= rows}
    if not lacking:
        return ()
    texts = ", ".join(f"{lacking[row]} (id {row})" for row in sorted(lacking)[:3])
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    return (
        f"the embedding has {rows} rows and none for {texts}{more}: it grows over them, with the "
        "mean of the used rows",
    )


def _own_code(source: SourceInfo) -> tuple[str, ...]:
    tokenizer = source.tokenizer
    if tokenizer.code is None:
        return ()
    if not has_class(source.model_type, tokenizer.declared_class):
        raise IncompatibleError(
            f"tokenizer_config.json: auto_map names {tokenizer.code}, code of the checkpoint's "
            "own, which is not run",
            hint="Read that code; if it does no more than its tokenizer.json, take auto_map out of "
            "tokenizer_config.json"
            if tokenizer.file == "tokenizer.json"
            else "Run it yourself once and save a tokenizer.json with save_pretrained, without "
            "auto_map in tokenizer_config.json",
        )
    return (
        f"tokenizer_config.json: auto_map names {tokenizer.code}, code of the checkpoint's own: "
        "it is not run and not copied, and transformers' own class takes its place",
    )
