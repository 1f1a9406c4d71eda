"""Settings of decoding against what a checkpoint says, before anything is decoded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dllm_convert.adapters import adapter_of
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import RequestError, spelt
from dllm_convert.modeling.converted_config import check_converted_config, read_section
from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.modeling.published.options import DecodingOptions
from dllm_convert.modeling.published.paired import NO_BLOCKS
from dllm_convert.modeling.published.settings import decoding_options
from dllm_convert.recipe.rules import decoding_contradictions
from dllm_convert.source.context import context_length, too_many_new
from dllm_convert.source.safetensors_header import load_json_object

_CLOSING = "closing_token_ids"
_TOKENIZER = object()


def check_decoding(
    folder: Path, given: Mapping[str, Any], *, other_verifies: bool = False
) -> DecodingOptions | None:
    """Refuse settings that contradict each other, the checkpoint or what it has saved.

    Args:
        folder: A converted checkpoint; only config.json and generation_config.json are read.
        given: Fields of `DecodingOptions`.
        other_verifies: Whether another model verifies what this one drafts.

    Returns:
        All settings together; None where the folder holds no diffusion checkpoint, of which
        loading it says more.

    Raises:
        IncompatibleError: config.json contradicts itself, or is of no known family.
        ValueError: They contradict, or do nothing.
    """
    config = _read(folder / "config.json")
    if diffusion_section(config) is None:
        return None
    check_converted_config(config, folder)
    saved = _read(folder / "generation_config.json")
    return check_settings(config, saved, given, other_verifies=other_verifies)


def check_settings(
    config: Mapping[str, Any],
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    other_verifies: bool = False,
) -> DecodingOptions:
    """Refuse settings that contradict each other, the model they are for or what it has saved.

    Args:
        config: Config of a diffusion model, of a known family.
        saved: Its generation config.
        given: Fields of `DecodingOptions`.
        other_verifies: Whether another model verifies what this one drafts; it takes the place of
            a verifier that is saved.

    Returns:
        All settings together.

    Raises:
        ValueError: They contradict, or do nothing.
    """
    read_ids(saved.get(_CLOSING), _CLOSING)
    given, asked = _apart({**given, "verify_with": None} if other_verifies else given)
    options = decoding_options(SimpleNamespace(**config), saved, 1, None, given, given=asked)
    if isinstance(given.get("max_new_tokens"), int):
        context = context_length(config, adapter_of(config))
        long = too_many_new(options.max_new_tokens, context, config)
        if long:
            raise ValueError(long)
    section = read_section(config)
    if other_verifies and (section.objective != "bd3lm" or not section.masks):
        raise ValueError(NO_BLOCKS)
    for wrong, _, _ in decoding_contradictions(
        given,
        options,
        blocks=section.objective == "bd3lm",
        masks=section.masks,
        other_verifies=other_verifies,
    ):
        raise ValueError(spelt(wrong, str))
    return options


def _apart(given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return settings by name and those in a `generation_config`, as `generate` tells them apart.

    There is always a tokenizer where text is written: which one does not matter to a check.
    """
    named = {"tokenizer": _TOKENIZER, **given}
    return named, named.pop("generation_config", None)


def check_with_prompts(
    model: Any, prompts: Sequence[Sequence[int]], seed: int | None, given: Mapping[str, Any]
) -> None:
    """Refuse settings that these prompts, as tokens, leave no room for, or that contradict.

    Raises:
        RequestError: They do.
    """
    config, saved, width = model.config, model.generation_config, max(map(len, prompts))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoding itself says what it has no use for
            given, asked = _apart(given)
            decoding_options(config, saved, len(prompts), seed, given, given=asked, width=width)
    except (TypeError, ValueError) as error:
        raise RequestError(str(error)) from error


def require_decoding(
    folder: Path,
    given: Mapping[str, Any],
    argument: str | None = None,
    *,
    other_verifies: bool = False,
) -> None:
    """Refuse settings as `check_decoding` does, as a request that cannot be met.

    Args:
        folder: A converted checkpoint.
        given: Fields of `DecodingOptions`.
        argument: Argument that said them.
        other_verifies: As in `check_decoding`.

    Raises:
        RequestError: They contradict, or do nothing.
    """
    try:
        check_decoding(folder, given, other_verifies=other_verifies)
    except (TypeError, ValueError) as error:
        raise RequestError(str(error), argument=argument) from error


def require_settings(model: Any, given: Mapping[str, Any], *, other_verifies: bool = False) -> None:
    """Refuse settings as `check_settings` does, of a model that is loaded.

    Raises:
        RequestError: They contradict, or do nothing; or it is no diffusion model.
    """
    config = model.config.to_dict()
    if diffusion_section(config) is None:
        raise RequestError(
            f"the model is a {type(model).__name__}, whose config has no 'diffusion' section: "
            "sample takes what load returns"
        )
    try:
        saved = model.generation_config.to_dict()
        check_settings(config, saved, given, other_verifies=other_verifies)
    except (TypeError, ValueError) as error:
        raise RequestError(str(error)) from error


def who_verifies(
    own: str | None, given: Mapping[str, Any], *, lossless: bool, base: object = None
) -> tuple[dict[str, Any], bool]:
    """Settle who decides what is written: nobody, the checkpoint's own verifier, another model.

    `verify_with="base"` is the base wherever it lies: in the checkpoint, or beside it.

    Args:
        own: What `own_verifier` says of the checkpoint.
        given: Fields of `DecodingOptions` that were asked for.
        lossless: Whether whichever verifier there is is to decide.
        base: Who is named in place of the base that was converted; None for nobody.

    Returns:
        The settings with the verifier among them, and whether that is another model.

    Raises:
        RequestError: A base is named, and nothing is to be verified by one.
    """
    asked = given.get("verify_with")
    if base is not None and not (lossless or asked == "base"):
        raise RequestError("`base` verifies what is drafted; give `lossless` too", argument="base")
    if base is not None and own == "base":
        raise RequestError(
            "this checkpoint holds its base, which verifies without another: leave `base` out",
            argument="base",
        )
    if base is not None and asked not in (None, "base"):
        raise RequestError(
            "`base` and `verify_with` both name who verifies: leave one out", argument="base"
        )
    if lossless and asked is None:
        given = {**given, "verify_with": own if own is not None and base is None else "base"}
    return dict(given), given.get("verify_with") == "base" and own != "base"


def own_verifier(checkpoint: Path | Mapping[str, Any]) -> str | None:
    """Return which verifier a checkpoint's folder, or config, holds; None for none.

    Where clean tokens were opened nothing is left that goes on from them: another model verifies.
    """
    found = _read(checkpoint / "config.json") if isinstance(checkpoint, Path) else checkpoint
    section = diffusion_section(found) or {}
    if section.get("acts_on") == "noisy":
        return "base"
    return "self" if section.get("context") == "causal" else None


def _read(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}
