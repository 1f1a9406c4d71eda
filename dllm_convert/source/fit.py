"""What a class makes of a checkpoint's tensors, and what their bytes say of the config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.source.info import TensorInfo
from dllm_convert.source.safetensors_header import FLOATS, TORCH_NAMES

Same = Callable[[str, str], bool | None]
"""Whether two tensors, by their names in the files, hold the same bytes; None if nobody can say."""

_EMBEDDERS = frozenset({"modules.json", "config_sentence_transformers.json"})


@dataclass(frozen=True)
class Fit:
    """What a class makes of a checkpoint's tensors.

    Attributes:
        names: Name in the files to name in the class, of every tensor that is kept.
        dropped: Names in the files of those the class does not load.
        config: Fields of config.json that the files contradict, with what they say.
        notes: One sentence per contradiction that was resolved.
        warnings: One sentence per kind of tensor that is left out and is no known leftover.
        twins: Names in the class of tensors that hold once more what another one holds.
        vocabulary: Names in the class of the tensors that have a row per token.
    """

    names: Mapping[str, str]
    dropped: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    twins: frozenset[str] = frozenset()
    vocabulary: tuple[str, ...] = ()

    @property
    def renamed(self) -> dict[str, str]:
        """Names in the files to names in the class, where they differ."""
        return {old: new for old, new in self.names.items() if old != new}


def is_tied(config: Mapping[str, Any], adapter: Adapter) -> bool:
    """Whether config.json says that head and embedding share weights.

    Absent means the default of transformers' config: true for the encoders, false for the decoders
    here.
    """
    default = adapter.attention == "bidirectional"
    if adapter.measured is not None:
        default = adapter.measured.config.get("tie_word_embeddings", default)
    return bool(config.get("tie_word_embeddings", default))


def decide_tie(
    config: Mapping[str, Any], names: Mapping[str, str], adapter: Adapter, same: Same
) -> tuple[bool, dict[str, Any], tuple[str, ...]]:
    """Decide from the bytes whether head and embedding are one.

    Args:
        config: config.json.
        names: Name in the class to name in the files.
        adapter: The family.
        same: Compares bytes.

    Returns:
        Whether they are, what config.json has to say instead, and a sentence on it.
    """
    tied = is_tied(config, adapter)
    if not tied or not {adapter.embedding, adapter.head} <= names.keys():
        return tied, {}, ()
    if same(names[adapter.embedding], names[adapter.head]) is not False:
        return True, {}, ()
    note = (
        f"{names[adapter.head]} holds other values than {names[adapter.embedding]}, though "
        "config.json ties them: they stay apart, and the output says so (tie_word_embeddings: "
        "false)"
    )
    return False, {"tie_word_embeddings": False}, (note,)


def stock(adapter: Adapter) -> str:
    """Return the words for what a checkpoint should be."""
    return f"a checkpoint of {adapter.stock_class}"


def declared_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the fields that declare another type than most of the weights have, corrected."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.size
    dtype = sizes.most_common(1)[0][0] if sizes else ""
    most = TORCH_NAMES[dtype] if dtype in FLOATS else None
    keys = [key for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    return {key: most for key in keys if most is not None and config[key] != most}


def headless_hint(
    adapter: Adapter, config: Mapping[str, Any], *, tied: bool, beside: Collection[str]
) -> str:
    """Say what to do about weights without their language-model head.

    Args:
        adapter: The family.
        config: config.json.
        tied: Whether head and embedding are one.
        beside: Names of the files beside the weights; they tell what a body was trained for.
    """
    if not _EMBEDDERS.isdisjoint(beside):
        return (
            "This is a model of sentence-transformers, a body trained to embed: take "
            f"{stock(adapter)} that it was made from"
        )
    if adapter.attention == "bidirectional":
        return f"Take {stock(adapter)}, not of a headless encoder"
    if not tied and "tie_word_embeddings" in config:
        return (
            f"Take {stock(adapter)}; if its head is its embedding, correct tie_word_embeddings "
            "in config.json"
        )
    return f"Take {stock(adapter)}, not of a body that was trained to embed or to score"
