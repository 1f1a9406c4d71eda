"""What a third-party checkpoint claims, and where it says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.source.config_numbers import is_id, is_size
from dllm_convert.source.info import TokenizerInfo
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.source.tokenizer_files import read_tokenizer
from dllm_convert.verification.foreign.layout import ForeignLayout


@dataclass(frozen=True)
class Claim:
    """A claim, with its grounds.

    Attributes:
        claim: The claim.
        mask_text: Text of the mask token, None if the tokenizer has none with that id.
        grounds: Where each part was found, one short text per part.
        contradictions: What the files say against it or leave out.
    """

    claim: DiffusionSection
    mask_text: str | None
    grounds: tuple[str, ...]
    contradictions: tuple[str, ...]


def read_claim(
    layout: ForeignLayout, folder: Path, config: Mapping[str, Any], block_size: int | None
) -> Claim:
    """Read what a checkpoint of a known layout claims.

    Args:
        layout: Its layout.
        folder: The checkpoint.
        config: Its config.json.
        block_size: Tokens per block as the user says, for files that do not.

    Raises:
        IncompatibleError: The block size is none, or makes no sense for the layout.
    """
    size, size_ground = _block_size(layout, config, block_size)
    tokenizer, problem = _tokenizer(folder, config)
    mask, mask_ground, against = _mask(layout, folder, config, tokenizer)
    claim = DiffusionSection(
        objective="mdlm" if size is None else "bd3lm",
        block_size=size,
        mask_token_id=mask,
        token_shift=layout.token_shift,
    )
    shift = "with" if layout.token_shift else "without"
    contradictions = [*against]
    if problem:
        contradictions.append(problem)
    if config.get("is_causal") is True:
        contradictions.append(f"config.json has is_causal true, {layout.name} is {claim.attention}")
    vocabulary = tokenizer.vocab if tokenizer else {}
    return Claim(
        claim,
        next((text for text, number in vocabulary.items() if number == mask), None),
        (size_ground, f"mask {mask} ({mask_ground})", f"{shift} token shift ({layout.name})"),
        tuple(contradictions),
    )


def _block_size(
    layout: ForeignLayout, config: Mapping[str, Any], given: int | None
) -> tuple[int | None, str]:
    stated = config.get("block_size")
    if layout.blocks == "never":
        if given is not None:
            raise IncompatibleError(
                f"--block {given} was given, and {layout.name} attends to the whole text",
                hint="Leave --block out",
            )
        return None, "bidirectional"
    if stated is not None and (not is_size(stated)):
        raise IncompatibleError(
            f"config.json: block_size is {stated!r}, expected a whole number of at least 1"
        )
    if stated is not None and given not in (None, stated):
        raise IncompatibleError(
            f"--block {given} was given, and config.json says block_size {stated}",
            hint="Leave --block out",
        )
    if stated or given:
        where = "config.json" if stated else "--block"
        return stated or given, f"blocks of {stated or given} ({where})"
    if layout.blocks == "always":
        size = layout.default_block_size
        return size, f"blocks of {size} (its sampler's default, config.json names none)"
    return None, "bidirectional (no block size in config.json, none given with --block)"


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> tuple[TokenizerInfo | None, str | None]:
    try:
        return read_tokenizer(folder, config), None
    except DataError as error:
        return None, error.message


def _places(
    layout: ForeignLayout, folder: Path, config: Mapping[str, Any], tokenizer: TokenizerInfo | None
) -> Iterator[tuple[str, Any]]:
    """Yield where a mask id is stated, with the id, the most trusted place first."""
    path = folder / "generation_config.json"
    generation = load_json_object(path) if path.is_file() else {}
    yield "config.json", config.get("mask_token_id")
    yield "generation_config.json", generation.get("mask_token_id")
    if tokenizer is None:
        return
    if tokenizer.mask_token is not None:
        yield "the tokenizer", tokenizer.vocab.get(tokenizer.mask_token)
    else:
        yield f"{layout.mask_text} in the tokenizer", tokenizer.vocab.get(layout.mask_text)


def _mask(
    layout: ForeignLayout, folder: Path, config: Mapping[str, Any], tokenizer: TokenizerInfo | None
) -> tuple[int, str, list[str]]:
    """Return the mask's id, where it is stated, and what speaks against it."""
    stated = {
        place: found
        for place, found in _places(layout, folder, config, tokenizer)
        if found is not None
    }
    wrong = [
        f"{place} has mask id {found!r}" for place, found in stated.items() if not is_id(found)
    ]
    ids = {place: found for place, found in stated.items() if is_id(found)}
    if tokenizer is not None and not any("tokenizer" in place for place in ids):
        wrong.append(f"the tokenizer has no mask token, neither declared nor as {layout.mask_text}")
    if not ids:
        # What its loader does: add the token behind the last one, whatever rows there are.
        new = tokenizer.size if tokenizer else 0
        return new, "stated nowhere, the id that a token added to the tokenizer would get", wrong
    place, mask = next(iter(ids.items()))
    wrong += [f"{other} has mask id {found}" for other, found in ids.items() if found != mask]
    return mask, place, wrong
