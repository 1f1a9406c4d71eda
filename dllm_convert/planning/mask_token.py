"""Which id becomes the mask, and how its embedding row is made.

In order: the tokenizer's own mask token; what the recipe names; an unused padded row of the
embedding; a token the vendor reserved; otherwise the embedding grows. A row that was never trained
has almost no norm and makes gradients explode at high mask rates (LLaDA2), so the row of a new mask
is set to the mean of the used ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import IncompatibleError
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo, TokenizerInfo

MaskRule = Literal["tokenizer", "recipe", "padded-row", "reserved", "grow"]

NEW_TOKENS = ("<|mask|>", "<|mask_token|>", "<|dllm_mask|>")
"""Texts for a new token; the first that the vocabulary does not have."""
ROW_MULTIPLE = 64
"""A grown embedding is rounded up to this, which matrix kernels like."""


@dataclass(frozen=True)
class MaskTokenDecision:
    """Which id becomes the mask and how its embedding row is made.

    Attributes:
        token: Text of the token.
        id: Row of the embedding.
        rule: Which rule of `mask_token.py` chose it.
        reason: The same in words, for the plan and the card.
        new: Whether the tokenizer must learn the token.
        write_row: Whether the row is overwritten with the mean of the used rows.
        used_rows: Rows 0..used_rows-1 enter the mean.
        tokenizer_size: Ids that the source's tokenizer has; new tokens come after them.
        rows_before: Rows of the embedding in the source.
        rows_after: Rows of the embedding in the output.
    """

    token: str
    id: int
    rule: MaskRule
    reason: str
    new: bool
    write_row: bool
    used_rows: int
    tokenizer_size: int
    rows_before: int
    rows_after: int


def embedding_rows(source: SourceInfo, adapter: Adapter) -> int:
    """Return the rows of the input embedding: of the tensor, or of the config if headers are mute.

    Raises:
        IncompatibleError: There is no usable number, or tensor and config disagree.
    """
    declared = source.config.get("vocab_size")
    tensor = source.tensors.get(adapter.embedding)
    if declared is not None and (isinstance(declared, bool) or not isinstance(declared, int)):
        raise IncompatibleError(f"config.json: vocab_size is {declared!r}, expected a whole number")
    if tensor is None:
        if declared is None:
            raise IncompatibleError(
                "config.json has no vocab_size", hint="Add it: the rows of the input embedding"
            )
        return declared
    if len(tensor.shape) != 2:
        raise IncompatibleError(
            f"{adapter.embedding} has shape {tensor.shape}, expected (vocabulary, hidden)"
        )
    if declared is not None and declared != tensor.shape[0]:
        raise IncompatibleError(
            f"config.json: vocab_size is {declared}, {adapter.embedding} has {tensor.shape[0]} "
            "rows",
            hint="Correct vocab_size in config.json",
        )
    return tensor.shape[0]


def _new_text(tokenizer: TokenizerInfo) -> str:
    text = next((text for text in NEW_TOKENS if text not in tokenizer.vocab), None)
    if text is None:
        raise IncompatibleError(
            f"the vocabulary has {', '.join(NEW_TOKENS)}, none of them as its mask token",
            hint="Name the mask: --set mask_token.token='<text>'",
        )
    return text


def _free_id(tokenizer: TokenizerInfo) -> int:
    """Return the first id past the tokenizer that nothing else uses."""
    row = tokenizer.size
    while row in tokenizer.reachable:
        row += 1
    return row


def _grown(rows: int, last: int) -> int:
    """Return the rows that an embedding needs for ids up to `last`."""
    if last < rows:
        return rows
    return -(-(last + 1) // ROW_MULTIPLE) * ROW_MULTIPLE


def _taken(text: str, row: int, why: str) -> IncompatibleError:
    return IncompatibleError(
        f"mask id taken: {text!r} (id {row}) {why}",
        hint="Name another, or leave mask_token out and let the rules choose",
    )


def _from_recipe(recipe: Recipe, tokenizer: TokenizerInfo, rows: int) -> MaskTokenDecision:
    """Check a mask the recipe names: an existing special token, a free row or a new text."""
    text, row = recipe.mask_token.token, recipe.mask_token.id
    if text is not None and not text.strip():
        raise IncompatibleError(f"mask_token.token is {text!r}, expected a text that can be seen")
    texts = {number: name for name, number in tokenizer.vocab.items()}
    if text is None and row is not None:
        text = texts.get(row)
    existing = text is not None and text in tokenizer.vocab
    if text is not None and existing:
        known = tokenizer.vocab[text]
        if row is not None and row != known:
            raise IncompatibleError(f"mask_token: {text!r} has id {known}, not {row}")
        row = known
        if text not in tokenizer.special:
            raise _taken(text, row, "is an ordinary token that text produces")
        reason = f"the recipe names the existing special token {text!r}"
    else:
        text = text or _new_text(tokenizer)
        if row is not None and row in texts:
            raise _taken(texts[row], row, "is another token")
        row = _free_id(tokenizer) if row is None else row
        reason = f"the recipe names {text!r} for row {row}, which no token uses"
    if row in tokenizer.reachable:
        raise _taken(text, row, "is used elsewhere: a named token, a template or a config id")
    if row >= max(rows, _free_id(tokenizer) + 1):
        raise IncompatibleError(
            f"mask_token.id is {row}, expected less than the {rows} rows of the embedding",
            hint=f"The first free id is {_free_id(tokenizer)}",
        )
    return _decision(text, row, "recipe", reason, tokenizer, rows, new=not existing)


def _decision(
    text: str,
    row: int,
    rule: MaskRule,
    reason: str,
    tokenizer: TokenizerInfo,
    rows: int,
    *,
    new: bool,
) -> MaskTokenDecision:
    return MaskTokenDecision(
        token=text,
        id=row,
        rule=rule,
        reason=reason,
        new=new,
        # A mask of the tokenizer's own keeps its row, if the weights have one for it.
        write_row=rule != "tokenizer" or row >= rows,
        used_rows=min(tokenizer.size, rows),
        tokenizer_size=tokenizer.size,
        rows_before=rows,
        rows_after=_grown(rows, max(row, tokenizer.size - 1)),
    )


def _why_not_own(tokenizer: TokenizerInfo, text: str) -> str | None:
    """Return why the tokenizer's own mask cannot serve: the rules for a mask hold for it too."""
    if not text.strip():
        return "it cannot be seen in a text"
    if tokenizer.mask_is_word:
        return "it is an ordinary token that text produces"
    if tokenizer.vocab[text] in tokenizer.reachable:
        return "it is something else too: a named token, a template's or a config's"
    return None


def _own(recipe: Recipe, tokenizer: TokenizerInfo, text: str, rows: int) -> MaskTokenDecision:
    """Take the mask that the model was trained with."""
    row = tokenizer.vocab[text]
    named = recipe.mask_token
    if named.token not in (None, text) or named.id not in (None, row):
        raise IncompatibleError(
            f"the recipe names a mask token, but the tokenizer has its own: {text!r} (id {row}), "
            "which the model was trained with",
            hint="Leave mask_token out of the recipe",
        )
    why = _why_not_own(tokenizer, text)
    if why is not None:
        raise IncompatibleError(
            f"the tokenizer's mask {text!r} (id {row}), which the model was trained with, cannot "
            f"mask: {why}",
            hint="Name a mask of its own in the tokenizer's files",
        )
    reason = f"the tokenizer has a mask token of its own, {text!r}"
    return _decision(text, row, "tokenizer", reason, tokenizer, rows, new=False)


def _reserved(tokenizer: TokenizerInfo, pattern: str) -> str | None:
    """Return the reserved token with the lowest id that nothing uses."""
    free = [
        text
        for text in tokenizer.special
        if re.fullmatch(pattern, text) and tokenizer.vocab[text] not in tokenizer.reachable
    ]
    return min(free, key=lambda text: tokenizer.vocab[text], default=None)


def _check_rows(tokenizer: TokenizerInfo, rows: int) -> None:
    """Check that the embedding has a row for all of the vocabulary proper.

    Added tokens may lie beyond: Gemma 3 has one for pictures, and many fine-tunes a padding token,
    at the id after the last row. No text asks for them, and the embedding grows over them.
    """
    proper = tokenizer.size if tokenizer.proper is None else tokenizer.proper
    if proper > rows:
        raise IncompatibleError(
            f"the tokenizer has ids up to {proper - 1}, the embedding only {rows} rows",
            hint="Use the tokenizer that belongs to these weights, or the weights whose embedding "
            "was resized to it",
        )


def decide_mask_token(recipe: Recipe, source: SourceInfo, adapter: Adapter) -> MaskTokenDecision:
    """Choose the mask token by the rules of this module.

    Raises:
        IncompatibleError: The vocabulary is larger than the embedding, or the id that the recipe
            or the tokenizer names is taken or out of range.
    """
    tokenizer = source.tokenizer
    rows = embedding_rows(source, adapter)
    _check_rows(tokenizer, rows)
    own = tokenizer.mask_token
    why = None if own is None else _why_not_own(tokenizer, own)
    # An encoder and a diffusion model know their mask; a causal model never saw one.
    trained = adapter.attention == "bidirectional" or diffusion_section(source.config) is not None
    if own is not None and (why is None or trained):
        return _own(recipe, tokenizer, own, rows)
    if recipe.mask_token.token is not None or recipe.mask_token.id is not None:
        return _from_recipe(recipe, tokenizer, rows)
    made = _by_the_rules(tokenizer, adapter, rows)
    if why is None:
        return made
    return replace(made, reason=f"the tokenizer calls {own!r} its mask, but {why}; {made.reason}")


def _by_the_rules(tokenizer: TokenizerInfo, adapter: Adapter, rows: int) -> MaskTokenDecision:
    """Choose a free row, a reserved token or a new row, in this order."""
    free = _free_id(tokenizer)
    if free < rows:
        reason = f"row {free} is the first of the embedding's {rows} that no token uses"
        text = _new_text(tokenizer)
        return _decision(text, free, "padded-row", reason, tokenizer, rows, new=True)
    reserved = _reserved(tokenizer, adapter.reserved_tokens) if adapter.reserved_tokens else None
    if reserved is not None:
        row = tokenizer.vocab[reserved]
        reason = f"{reserved!r} was reserved by the vendor and nothing uses it"
        return _decision(reserved, row, "reserved", reason, tokenizer, rows, new=False)
    reason = f"no row is free: the embedding grows from {rows} to {_grown(rows, free)} rows"
    return _decision(_new_text(tokenizer), free, "grow", reason, tokenizer, rows, new=True)


def unused_ids(tokenizer: TokenizerInfo, mask: MaskTokenDecision) -> tuple[tuple[int, int], ...]:
    """Return the rows of the output's embedding that are no token: first, and one past the last.

    Padding of the embedding, gaps, and what fills them: no text has them, so decoding writes none.
    """
    taken = sorted({*tokenizer.vocab.values(), mask.id})
    edges = zip([-1, *taken], [*taken, mask.rows_after], strict=True)
    return tuple((before + 1, after) for before, after in edges if after - before > 1)
