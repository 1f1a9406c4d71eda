"""What is known of a checkpoint before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from dllm_convert.source.base_card import BaseCard

SourceKind = Literal["hub", "folder", "gguf"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors (or GGUF) header declares it.

    Attributes:
        dtype: safetensors name (`F32`, `BF16`, ...) or, in a GGUF, the quantisation (`Q4_1`).
        shape: Sizes, outermost first.
        file: Name of the shard that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class TokenizerInfo:
    """What the mask-token rules need of a tokenizer, read without transformers.

    Attributes:
        vocab: Token text to id, added tokens included.
        special: Texts that the tokenizer treats as special or that no text can produce.
        reachable: Ids used by anything else in the tokenizer (template, post-processor, named
            tokens) or by the model's config, the mask token's own entry left out.
        size: Largest id plus one.
        proper: Rows that the vocabulary without added tokens needs; None for all of them.
        mask_token: The tokenizer's own mask token, if it has one.
        beside: Texts that side files or the class add to what the vocabulary file has, in the order
            of their ids.
        mask_is_word: Whether it is one that ordinary text produces.
        file: Name of the file that holds the vocabulary; None for a GGUF file.
        declared_class: `tokenizer_class` that the folder names.
        code: Class of the folder's own code that `auto_map` names for the tokenizer.
        named: Role (`bos`, `eos`, ...) to the text of its token.
    """

    vocab: Mapping[str, int]
    special: frozenset[str]
    reachable: frozenset[int]
    size: int
    mask_token: str | None = None
    proper: int | None = None
    beside: tuple[str, ...] = ()
    mask_is_word: bool = False
    file: str | None = None
    declared_class: str | None = None
    code: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceInfo:
    """A checkpoint seen through its headers.

    Attributes:
        given: What the user typed.
        kind: hub, folder or gguf.
        path: Local folder or file; None for a Hub id that has not been downloaded.
        repo_id: Hub id, if it is one.
        revision: Commit of the Hub repository, 40 hex digits.
        config: config.json as a mapping (of a GGUF: the fields its metadata gives).
        tensors: Tensor name to header entry; empty if the format tells nothing without loading.
        tokenizer: What the tokenizer files say.
        card: Licence, languages and origin, as the base's author states them.
        fingerprint: Identity of the content: commit, or file names with sizes and times.
        files: Names of the files that belong to the checkpoint.
        beside: Names of all files that lie where the checkpoint does.
        twins: Tensors that hold once more what another one holds, such as a tied head.
        warnings: What the user should know about the files themselves.
        gated: Whether the Hub's owner grants access one by one: `auto`, `manual` or no; None if
            nobody said.
        generation: generation_config.json as a mapping; empty if there is none.
        inside: `model_type` of the model that holds this one, whose text model it is; else None.
    """

    given: str
    kind: SourceKind
    path: Path | None
    repo_id: str | None
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    tokenizer: TokenizerInfo
    card: BaseCard = field(default_factory=BaseCard)
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    twins: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    gated: Literal["auto", "manual", "no"] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    inside: str | None = None

    @property
    def license(self) -> str | None:
        """Licence id, from the base's card."""
        return self.card.license

    @property
    def model_type(self) -> str:
        """The `model_type` of the config."""
        return str(self.config["model_type"])

    @property
    def parameters(self) -> int:
        """Number of weights in the file, tied tensors counted once; 0 if headers do not tell."""
        return sum(t.size for name, t in self.tensors.items() if name not in self.twins)
