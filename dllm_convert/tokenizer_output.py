"""Write the tokenizer with its mask token, and prove that nothing else about it changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.mask_token import MaskTokenDecision
from dllm_convert.tokenizer_loading import TokenizerErrors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x ** 2  # naïve\n\n",
    "Größe 12,345.67 €, 漢字 и кириллица 🙂",
    "MKTAYIAKQR QISFVKSHFS",
)
"""Texts whose ids must not change: prose, code with its spaces, other scripts, capitals."""

_NAMES = ("bos", "eos", "pad", "unk", "sep", "cls")


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"transformers cannot load the tokenizer in {folder} ({reason})",
            hint="Save it as tokenizer.json with save_pretrained; a SentencePiece model alone "
            "needs pip install 'dllm-convert[sentencepiece]'",
        ) from error
    return tokenizer


def _facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return everything that must be the same before and after."""
    names = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in _NAMES}
    encodings = {f"ids of {text!r}": tokenizer(text)["input_ids"] for text in SAMPLES}
    return {**names, "chat_template": tokenizer.chat_template, **encodings}


def _set_mask(tokenizer: PreTrainedTokenizerBase, mask: MaskTokenDecision) -> None:
    from transformers import AddedToken

    # Ids are given out in order: rows between the last token and the mask need a text as well.
    filler = [f"<|unused_{row}|>" for row in range(len(tokenizer), mask.id)] if mask.new else []
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in filler], special_tokens=True
    )
    token = AddedToken(mask.token, special=True, normalized=False, lstrip=False, rstrip=False)
    tokenizer.add_special_tokens({"mask_token": token})


def _check(out: Path, mask: MaskTokenDecision, before: dict[str, Any]) -> None:
    tokenizer = _load(out)
    if tokenizer.mask_token_id != mask.id:
        raise IncompatibleError(
            f"the saved tokenizer gives {mask.token!r} id {tokenizer.mask_token_id}, "
            f"the plan chose {mask.id}",
            hint="Name another mask token in the recipe",
        )
    if tokenizer(f"a{mask.token}b")["input_ids"].count(mask.id) != 1:
        raise IncompatibleError(f"the saved tokenizer does not find {mask.token!r} in a text")
    after = _facts(tokenizer)
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise IncompatibleError(
            f"adding {mask.token!r} changed the tokenizer: {changed[0]} was "
            f"{before[changed[0]]!r}, is {after[changed[0]]!r}",
            hint="Name another mask token in the recipe",
        )


def write_tokenizer(mask: MaskTokenDecision, source: Path, out: Path) -> None:
    """Save the source's tokenizer with `mask` into `out`, which has its config.json already.

    Raises:
        DataError: transformers cannot load the source's tokenizer.
        IncompatibleError: After reloading, the mask's id or anything else is not as planned.
    """
    tokenizer = _load(source)
    before = _facts(tokenizer)
    if mask.rule != "tokenizer":
        _set_mask(tokenizer, mask)
    # On a full disk the Rust library raises an Exception of no class.
    with TokenizerErrors("the tokenizer cannot be written"):
        tokenizer.save_pretrained(out)
    _check(out, mask, before)
