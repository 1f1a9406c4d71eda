"""Write the tokenizer with its mask token, and prove that nothing else about it changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dllm_convert.common.json_files import write_json
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning.mask_token import MaskTokenDecision
from dllm_convert.source.info import TokenizerInfo
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.source.text_model import text_config
from dllm_convert.source.tokenizer_files import KEPT_ROLES
from dllm_convert.source.tokenizer_loading import TokenizerErrors, load_tokenizer
from dllm_convert.weights.tokenizer_json import (
    TOKENIZER_FILE,
    check_written,
    texts_below,
    write_tokenizer_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE, SETTINGS_FILE = "config.json", "tokenizer_config.json"
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x ** 2  # naïve\n\n",
    "Größe 12,345.67 €, 漢字 и кириллица 🙂",
    "MKTAYIAKQR QISFVKSHFS",
)
"""Texts whose ids must not change: prose, code with its spaces, other scripts, capitals."""


def _facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return everything that must be the same before and after."""
    names = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in KEPT_ROLES
    }
    with TokenizerErrors("the tokenizer cannot encode a text"):
        encodings = {f"ids of {text!r}": tokenizer(text)["input_ids"] for text in SAMPLES}
    return {**names, "chat_template": tokenizer.chat_template, **encodings}


def _set_mask(tokenizer: PreTrainedTokenizerBase, mask: MaskTokenDecision) -> None:
    from transformers import AddedToken

    texts = texts_below(mask, len(tokenizer)).values()
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in texts], special_tokens=True
    )
    token = AddedToken(mask.token, special=True, normalized=False, lstrip=False, rstrip=False)
    tokenizer.add_special_tokens({"mask_token": token})


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Say what is another, None if nothing is."""
    name = next((name for name in before if before[name] != after[name]), None)
    return None if name is None else f"{name} was {before[name]!r}, is {after[name]!r}"


def _check(out: Path, mask: MaskTokenDecision, before: dict[str, Any]) -> str | None:
    """Load the conversion's tokenizer; return what the mask changed beside itself.

    Raises:
        DataError: transformers cannot load it.
        IncompatibleError: The mask is not where the plan says, or texts do not find it.
    """
    tokenizer = load_tokenizer(out)
    check_written(mask, tokenizer.mask_token_id, tokenizer(f"a{mask.token}b")["input_ids"])
    return _changed(before, _facts(tokenizer))


def _name_class(loaded: PreTrainedTokenizerBase, out: Path) -> None:
    """Write which class the source's tokenizer is of: for some families its config decides that.

    The config of a text model may decide otherwise than that of the model that held it.
    """
    path, name = out / SETTINGS_FILE, type(loaded).__name__
    settings = load_json_object(path) if path.is_file() else {}
    if settings.get("tokenizer_class") != name:
        write_json(path, {**settings, "tokenizer_class": name})


def _save(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    # On a full disk the Rust library raises an Exception of no class.
    with TokenizerErrors("the tokenizer cannot be written"):
        tokenizer.save_pretrained(out)


def _blame(source: Path, mask: MaskTokenDecision, before: dict[str, Any], change: str) -> None:
    """Raise what is the reason of a change: the mask, or saving alone.

    Raises:
        DataError: Saved without a mask, the tokenizer is another one too.
        IncompatibleError: It is the mask.
    """
    with TemporaryDirectory() as name:
        control = Path(name)
        if (source / "config.json").is_file():
            shutil.copyfile(source / "config.json", control / "config.json")
        _save(load_tokenizer(source), control)
        alone = _changed(before, _facts(load_tokenizer(control)))
    if alone is not None:
        raise DataError(
            f"transformers saves another tokenizer than it loads: {alone}",
            hint="Put a tokenizer.json beside the weights: it is kept as it is",
        )
    raise IncompatibleError(
        f"adding {mask.token!r} changed the tokenizer: {change}",
        hint="Name another mask token in the recipe",
    )


def write_tokenizer(
    mask: MaskTokenDecision,
    tokenizer: TokenizerInfo,
    source: Path,
    out: Path,
    *,
    light: bool = False,
) -> None:
    """Write the source's tokenizer with `mask` into `out`, which has its config.json already.

    A tokenizer.json is edited as a file. Only where there is none transformers makes one, of what
    it loads: what it writes is not always what it read.

    Args:
        mask: The decision.
        tokenizer: What the source's files say.
        source: Folder of the source.
        out: Folder of the conversion.
        light: Whether to leave the proof by transformers out, whose import takes seconds.

    Raises:
        DataError: transformers cannot load the source's tokenizer.
        IncompatibleError: After reloading, the mask's id or anything else is not as planned.
    """
    edited = (source / TOKENIZER_FILE).is_file()
    config = source / CONFIG_FILE
    inside = config.is_file() and text_config(load_json_object(config)) is not None
    if edited:
        write_tokenizer_json(mask, tokenizer, source, out)
        if light and not inside:
            return
    loaded = load_tokenizer(source)
    if edited and inside:
        _name_class(loaded, out)
    before = _facts(loaded)
    if not edited:
        if mask.rule != "tokenizer":
            _set_mask(loaded, mask)
        _save(loaded, out)
    change = _check(out, mask, before)
    if change is not None:
        _blame(source, mask, before, change)
