"""Give a tokenizer.json its mask token as a file, without transformers.

Everything else in the file stays what it is: what transformers writes after reading it is at times
another tokenizer. So only the mask needs to be looked at afterwards; `tokenizers`, the library that
will read it, does that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_convert.common.json_files import write_config
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning.mask_token import MaskTokenDecision
from dllm_convert.source.folder import file_names, matching
from dllm_convert.source.info import TokenizerInfo
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.source.tokenizer_classes import is_known
from dllm_convert.source.tokenizer_files import SIDE_FILES, VOCABULARY_FILES
from dllm_convert.source.tokenizer_loading import TokenizerErrors

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_REPLACED = "tekken.json"
"""Where mistral-common is installed, transformers would read this instead, and it has no mask."""
_CODE = ("auto_map", "custom_pipelines")
_PLACES = ("name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")
"""Keys that name code, or places on the machine of whoever saved the tokenizer."""
_GENERIC = "PreTrainedTokenizerFast"
_ADDED = re.compile(r'(?<!\\)"added_tokens"\s*:\s*\[')


def _token(content: str, *, special: bool = True) -> dict[str, Any]:
    """Return how an added token is described, the id left out: matched as it is."""
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def texts_below(mask: MaskTokenDecision, size: int) -> dict[int, str]:
    """Return texts for the rows in front of a new mask: ids are given out in order."""
    return {row: f"<|unused_{row}|>" for row in range(size, mask.id)} if mask.new else {}


def check_written(mask: MaskTokenDecision, row: int | None, ids: Sequence[int]) -> None:
    """Check that a saved tokenizer gives its mask this `row`, and a text with it these `ids`.

    Raises:
        IncompatibleError: The id is not what the plan says, or the text has it not once.
    """
    if row == mask.id and ids.count(mask.id) == 1:
        return
    said = f"does not find {mask.token!r} in a text"
    if row != mask.id:
        said = f"gives {mask.token!r} id {row}, the plan chose {mask.id}"
    raise IncompatibleError(
        f"the saved tokenizer {said}", hint="Name another mask token in the recipe"
    )


def _new_tokens(
    mask: MaskTokenDecision, tokenizer: TokenizerInfo, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what has to be among the added tokens of tokenizer.json, each with its id.

    Ids are given out in order, so what only side files add comes first.
    """
    decoder = settings.get("added_tokens_decoder")
    described = {
        token["content"]: {key: value for key, value in token.items() if key != "id"}
        for token in (decoder.values() if isinstance(decoder, Mapping) else ())
        if isinstance(token, Mapping) and isinstance(token.get("content"), str)
    }
    beside = [
        {
            "id": tokenizer.vocab[text],
            **_token(text, special=text in tokenizer.special),
            **described.get(text, {}),
        }
        for text in tokenizer.beside
    ]
    new = texts_below(mask, tokenizer.size)
    if mask.token not in tokenizer.beside:
        new[mask.id] = mask.token
    return [*beside, *({"id": row, **_token(text)} for row, text in new.items())]


def _entries(
    listed: Iterable[Any], new: Iterable[Mapping[str, Any]], vocab: Container[str]
) -> list[Any]:
    """Return the added tokens with `new` among them, all others in their order.

    The library counts for itself: the order of new tokens is what gives them their ids. A token
    that transformers does not load, because the side files leave it out, would take one.
    """
    waiting = {token["content"]: token for token in new}
    loaded = [token for token in listed if token["content"] in vocab]
    kept = [waiting.pop(token["content"], token) for token in loaded]
    return [*kept, *waiting.values()]


def _with_tokens(text: str, new: Iterable[Mapping[str, Any]], vocab: Container[str]) -> str:
    """Return a tokenizer.json with `new` among its added tokens; all other text stays.

    A vocabulary of megabytes is neither parsed nor written anew for one token, unless the list of
    added tokens is not there or its name stands in two places.
    """
    places = list(_ADDED.finditer(text))
    if len(places) != 1:
        content = json.loads(text)
        content["added_tokens"] = _entries(content.get("added_tokens") or (), new, vocab)
        return json.dumps(content, indent=2, ensure_ascii=False)
    start = places[0].end() - 1
    listed, end = json.JSONDecoder().raw_decode(text, start)
    entries = json.dumps(_entries(listed, new, vocab), indent=2, ensure_ascii=False)
    return text[:start] + entries + text[end:]


def _optional(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}


def _write_side_files(
    source: Path, out: Path, mask: str, settings: Mapping[str, Any], new: list[dict[str, Any]]
) -> None:
    """Name the mask in the files beside tokenizer.json, and no code of the checkpoint's.

    Args:
        source: Folder of the source.
        out: Folder of the conversion.
        mask: Text of the mask.
        settings: tokenizer_config.json of the source.
        new: Tokens that were added; none for a mask of the tokenizer's own.
    """
    config = {key: value for key, value in settings.items() if key not in (*_CODE, *_PLACES)}
    declared = config.get("tokenizer_class")
    if declared is not None and not (isinstance(declared, str) and is_known(declared)):
        config["tokenizer_class"] = _GENERIC
    if new or not config.get("mask_token"):
        config["mask_token"] = mask
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in new}
        config["added_tokens_decoder"] = decoder | entries
    write_config(out / CONFIG_FILE, config)
    named = _optional(source / "special_tokens_map.json")
    if named and (new or not named.get("mask_token")):
        write_config(out / "special_tokens_map.json", named | {"mask_token": mask})
    listed = _optional(source / "added_tokens.json")
    if listed and new:
        write_config(out / "added_tokens.json", listed | {t["content"]: t["id"] for t in new})


def _found(path: Path, mask: MaskTokenDecision) -> tuple[int | None, list[int]]:
    """Return the id of the mask's text, and the ids of a text with it.

    Raises:
        DataError: The file is broken.
    """
    from tokenizers import Tokenizer

    with TokenizerErrors(f"{path.name}: tokenizers cannot read it"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        return tokenizer.token_to_id(mask.token), list(tokenizer.encode(f"a{mask.token}b").ids)


def _write_tokenizer(
    mask: MaskTokenDecision,
    source: Path,
    out: Path,
    new: list[dict[str, Any]],
    vocab: Container[str],
) -> None:
    try:
        text = _with_tokens(source.read_text(encoding="utf-8"), new, vocab)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{source.name}: not a tokenizer of the tokenizers library ({error})"
        ) from error
    out.write_text(text, encoding="utf-8")
    check_written(mask, *_found(out, mask))


def write_tokenizer_json(
    mask: MaskTokenDecision, tokenizer: TokenizerInfo, source: Path, out: Path
) -> None:
    """Copy the source's tokenizer files into `out` with `mask` added to them.

    Args:
        mask: The decision.
        tokenizer: What the source's files say.
        source: Folder with a tokenizer.json.
        out: Folder of the conversion.

    Raises:
        DataError: A file is broken.
        IncompatibleError: The mask's id is not what the plan says, or texts do not find it.
    """
    patterns = (*VOCABULARY_FILES, *SIDE_FILES, "additional_chat_templates/*.jinja")
    for name in matching(file_names(source), patterns):
        if name != _REPLACED:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
    settings = _optional(source / CONFIG_FILE)
    new = _new_tokens(mask, tokenizer, settings)
    row, ids = _found(source / TOKENIZER_FILE, mask) if mask.rule == "tokenizer" else (None, [])
    if row == mask.id and ids.count(mask.id) == 1:
        new = []
    else:
        places = (source / TOKENIZER_FILE, out / TOKENIZER_FILE)
        _write_tokenizer(mask, *places, new, tokenizer.vocab)
    _write_side_files(source, out, mask.token, settings, new)
