"""Give a tokenizer.json its mask token as a file, without transformers.

Everything else in the file stays what it is, so only the mask needs to be looked at afterwards;
`tokenizers`, the library that will read it, does that.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from dllm_convert.errors import IncompatibleError
from dllm_convert.mask_token import MaskTokenDecision
from dllm_convert.safetensors_header import load_json_object
from dllm_convert.source_folder import file_names, matching
from dllm_convert.tokenizer_files import SIDE_FILES, VOCABULARY_FILES
from dllm_convert.tokenizer_loading import TokenizerErrors

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_ADDED = re.compile(r'(?<!\\)"added_tokens"\s*:\s*\[')


def _token(content: str) -> dict[str, Any]:
    """Return how an added token is described, the id left out: special, matched as it is."""
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _new_tokens(mask: MaskTokenDecision) -> dict[int, str]:
    """Return id to text of what has to be in the vocabulary: the mask, and texts for a gap."""
    if not mask.new:
        return {mask.id: mask.token}
    # Ids are given out in order: rows between the last token and the mask need a text as well.
    filler = {row: f"<|unused_{row}|>" for row in range(mask.used_rows, mask.id)}
    return filler | {mask.id: mask.token}


def _with_mask(text: str, tokens: dict[int, str]) -> str:
    """Return a tokenizer.json with `tokens` among its added ones; all other text stays.

    A vocabulary of megabytes is neither parsed nor written anew for one token.
    """
    place = _ADDED.search(text)
    if place is None:
        raise RuntimeError("asked to add to a list that is not there")
    start = place.end() - 1
    listed, end = json.JSONDecoder().raw_decode(text, start)
    kept = [token for token in listed if token["id"] not in tokens]
    added = [{"id": row, **_token(content)} for row, content in tokens.items()]
    new = sorted([*kept, *added], key=lambda token: token["id"])
    return text[:start] + json.dumps(new, indent=2, ensure_ascii=False) + text[end:]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_side_files(source: Path, out: Path, mask: str, tokens: dict[int, str]) -> None:
    """Name the mask in the files beside tokenizer.json that list special tokens."""
    path = source / CONFIG_FILE
    config = load_json_object(path) if path.is_file() else {}
    config["mask_token"] = mask
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] |= {str(row): _token(text) for row, text in tokens.items()}
    _write(out / CONFIG_FILE, config)
    if (source / "special_tokens_map.json").is_file():
        named = load_json_object(source / "special_tokens_map.json")
        _write(out / "special_tokens_map.json", named | {"mask_token": mask})
    if (source / "added_tokens.json").is_file():
        listed = load_json_object(source / "added_tokens.json")
        _write(out / "added_tokens.json", listed | {text: row for row, text in tokens.items()})


def _check(path: Path, mask: MaskTokenDecision) -> None:
    from tokenizers import Tokenizer

    with TokenizerErrors(f"{path.name}: tokenizers cannot read it"):
        tokenizer = Tokenizer.from_file(str(path))
    found = tokenizer.token_to_id(mask.token)
    if found != mask.id:
        raise IncompatibleError(
            f"the saved tokenizer gives {mask.token!r} id {found}, the plan chose {mask.id}",
            hint="Name another mask token in the recipe",
        )
    if tokenizer.encode(f"a{mask.token}b").ids.count(mask.id) != 1:
        raise IncompatibleError(f"the saved tokenizer does not find {mask.token!r} in a text")


def write_tokenizer_json(mask: MaskTokenDecision, source: Path, out: Path) -> bool:
    """Copy the source's tokenizer files into `out` with `mask` added to them.

    Returns:
        False, and nothing is written, if the source has no tokenizer.json that can be edited so.

    Raises:
        DataError: A file is broken.
        IncompatibleError: The mask's id is not what the plan says, or texts do not find it.
    """
    path = source / TOKENIZER_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if len(_ADDED.findall(text)) != 1:
        return False
    patterns = (*VOCABULARY_FILES, *SIDE_FILES, "additional_chat_templates/*.jinja")
    for name in matching(file_names(source), patterns):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    if mask.rule != "tokenizer":
        tokens = _new_tokens(mask)
        (out / TOKENIZER_FILE).write_text(_with_mask(text, tokens), encoding="utf-8")
        _write_side_files(source, out, mask.token, tokens)
    _check(out / TOKENIZER_FILE, mask)
    return True
