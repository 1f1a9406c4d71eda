"""What is known of a checkpoint layout that other projects write, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Blocks = Literal["never", "unrecorded", "always"]
BlockMask = Literal["none", "3d", "4d"]


@dataclass(frozen=True)
class ForeignLayout:
    """A layout: how config.json shows it, what it claims, what computes it.

    The defaults are those of weights shaped like Llama under their usual names.

    Attributes:
        name: What reports call it.
        model_types: `model_type` values it goes by.
        mask_text: Text of its mask token, for tokenizers that do not declare it as theirs.
        family: `model_type` of the adapter whose class computes the same from the same tensors;
            None if no stock class does.
        architectures: Class names it goes by; empty for any.
        requires: Config key to the values under which `family` computes the same. None stands for
            a key that is absent or null.
        stock_config: Turns its config into the fields of the stock one.
        renames: Regular expressions of its tensor names to the stock names.
        embedding: Its name of the input embedding.
        token_shift: Whether position i is predicted from the hidden state of i-1.
        blocks: `never` bidirectional throughout; `always` block diffusion; `unrecorded` either, and
            the files do not say which.
        default_block_size: What its own sampler takes where config.json names no block size.
        block_mask: How its own code is told of blocks: not at all, or by a boolean mask of shape
            (batch, length, length) or (batch, 1, length, length).
        tokenizer_class: Stock tokenizer that reads the same files as the layout's own.
    """

    name: str
    model_types: tuple[str, ...]
    mask_text: str
    family: str | None = None
    architectures: tuple[str, ...] = ()
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    stock_config: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    renames: Mapping[str, str] = field(default_factory=dict)
    embedding: str = "model.embed_tokens.weight"
    token_shift: bool = False
    blocks: Blocks = "never"
    default_block_size: int | None = None
    block_mask: BlockMask = "none"
    tokenizer_class: str | None = None

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this layout."""
        if config.get("model_type") not in self.model_types:
            return False
        named = config.get("architectures") or ()
        return not self.architectures or not named or bool({*self.architectures} & {*named})

    def unmet(self, config: Mapping[str, Any]) -> str | None:
        """Return why no stock class computes this checkpoint, None if one does."""
        if self.family is None:
            return f"no class of transformers computes the layout {self.name}"
        for key, values in self.requires.items():
            found = config.get(key)
            # 1 == True in Python, and not in JSON.
            if (type(found), found) not in [(type(value), value) for value in values]:
                wanted = " or ".join("absent" if v is None else repr(v) for v in values)
                return (
                    f"{key} is {found!r}; the {self.family} class computes {self.name} only where "
                    f"it is {wanted}"
                )
        return None

    def stock_name(self, name: str) -> str:
        """Return the stock name of a tensor; one that no rule knows keeps its name."""
        for pattern, replacement in self.renames.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        return name
