"""One checkpoint's tensors beside the declaration of its class: names, shapes, types, flags."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.tensors import ClassTensors, sizes_of
from dllm_convert.errors import IncompatibleError
from dllm_convert.source.fit import (
    Fit,
    Same,
    decide_tie,
    declared_dtype,
    headless_hint,
    is_tied,
    stock,
)
from dllm_convert.source.info import TensorInfo
from dllm_convert.source.leftovers import computed_with, is_known_leftover
from dllm_convert.source.safetensors_header import FLOATS
from dllm_convert.source.tensor_names import every_name, loaded_as

_WRAPPERS = ("module.", "_orig_mod.", "pretrained_model.", "base_model.model.")
_ADAPTERS = re.compile(r".*\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\b.*")
_OTHER_CONFIG = "Take the config.json that belongs to these weights"


class ClassFit:
    """One checkpoint beside the declaration of its class."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        adapter: Adapter,
        declared: ClassTensors,
        same: Same,
    ) -> None:
        self._config, self._tensors, self._adapter = config, tensors, adapter
        self._declared, self._same = declared, same
        self._sizes = sizes_of(declared, config)
        self._known = every_name(declared, tensors)
        self._files: dict[str, str] = {}
        for name in tensors:
            new = loaded_as(name, self._known, declared.prefix)
            if new in self._files:
                raise IncompatibleError(
                    f"{self._files[new]} and {name} are both {new} to {adapter.stock_class}",
                    hint="Save the model with save_pretrained, which writes every tensor once",
                )
            self._files[new] = name

    def fit(self, *, typed: bool, beside: Collection[str]) -> Fit:
        """Compare, in the order in which one cause hides another."""
        adapter = self._adapter
        self._check_wrapped()
        head_only = self._embedding_from_head()
        self._check_embedding()
        self._check_layers()
        flags, correction, notes = self._flags()
        tied, untie, why = decide_tie(self._config, self._files, adapter, self._same)
        correction |= untie
        wanted = self._declared.names(self._sizes["num_hidden_layers"], flags)
        twins = self._twins(tied=tied)
        self._check_missing(wanted.keys() - twins, tied=tied, beside=beside)
        foreign = [new for new in self._files if new not in wanted]
        self._check_foreign(foreign, wanted)
        kept = {new: self._tensors[old] for new, old in self._files.items() if new in wanted}
        self._check_shapes(kept, wanted)
        if typed:
            _check_types(kept)
            correction |= declared_dtype(self._config, kept)
        doubled = self._doubled_bias(twins)
        dropped = tuple(self._files[new] for new in (*foreign, *doubled))
        names = {old: new for new, old in self._files.items() if new in kept and new not in doubled}
        present = (adapter.embedding, adapter.head, *adapter.head_biases)
        return Fit(
            names,
            dropped,
            correction,
            (*head_only, *notes, *why),
            _left_out(foreign, adapter),
            frozenset(twins & set(names.values())),
            tuple(name for name in present if name in names.values()),
        )

    def _check_wrapped(self) -> None:
        """Refuse the files of a wrapper around the model: an adapter, a parallel or compiled one.

        Raises:
            IncompatibleError: The names say so.
        """
        adapted = next((name for name in self._tensors if _ADAPTERS.fullmatch(name)), None)
        if adapted is not None:
            raise IncompatibleError(
                f"the weights hold an adapter that was not merged ({adapted})",
                hint="Merge it (merge_and_unload of PEFT), and give the merged model",
            )
        for prefix in _WRAPPERS:
            bare = {name.removeprefix(prefix) for name in self._tensors}
            fits = {loaded_as(name, self._known, self._declared.prefix) for name in bare}
            first = next((name for name in self._tensors if name.startswith(prefix)), None)
            inside = first is not None and self._adapter.embedding not in self._files
            if inside and self._adapter.embedding in fits:
                raise IncompatibleError(
                    f"the names of the tensors begin with {prefix!r} ({first}), which a wrapper "
                    "around the model added",
                    hint="Save the model inside it with save_pretrained",
                )

    def _embedding_from_head(self) -> tuple[str, ...]:
        """Take a tied head for the embedding where a file holds it under the head's name only."""
        adapter = self._adapter
        alone = adapter.head in self._files and adapter.embedding not in self._files
        if not alone or not is_tied(self._config, adapter):
            return ()
        name = self._files.pop(adapter.head)
        self._files[adapter.embedding] = name
        return (f"{name} is written as {adapter.embedding}, which it is tied to",)

    def _check_embedding(self) -> None:
        name, adapter = self._adapter.embedding, self._adapter
        if name not in self._files:
            raise IncompatibleError(f"the weights have no {name}, expected {stock(adapter)}")
        shape = self._shape(name)
        if len(shape) != 2:
            raise IncompatibleError(f"{name} has shape {shape}, expected (vocabulary, hidden)")
        rows, width = shape
        declared, hidden = self._config.get("vocab_size"), self._sizes["hidden_size"]
        if declared is not None and declared != rows:
            raise IncompatibleError(
                f"config.json: vocab_size is {declared}, {name} has {rows} rows",
                hint="Correct vocab_size in config.json",
            )
        self._sizes["vocab_size"] = rows
        if width != hidden:
            raise IncompatibleError(
                f"{name} is {width} wide, config.json says hidden_size {hidden}", hint=_OTHER_CONFIG
            )

    def _shape(self, new: str) -> tuple[int, ...]:
        return self._tensors[self._files[new]].shape

    def _layers(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        start = self._declared.layers
        for new in self._files:
            number, dot, rest = new.removeprefix(start).partition(".")
            if new.startswith(start) and dot and number.isdecimal():
                found.setdefault(int(number), set()).add(rest)
        return found

    def _check_layers(self) -> None:
        """Check that the files have the layers that the config says, all with the same tensors."""
        layers, expected = self._layers(), range(self._sizes["num_hidden_layers"])
        if set(layers) != set(expected):
            raise IncompatibleError(
                f"the weights have {len(layers)} layers, config.json says {len(expected)}",
                hint="Correct num_hidden_layers, or take the complete weights",
            )
        known = {*self._declared.inside, *(n for f in self._declared.flagged.values() for n in f)}
        complete = set().union(*layers.values()) & known
        for number, names in sorted(layers.items()):
            lacking = sorted(self._declared.of_layer(number, complete) - names)
            if lacking:
                raise IncompatibleError(
                    f"layer {number} has no {', '.join(lacking[:3])}, which other layers have: it "
                    "would be random",
                    hint="Take the complete weights",
                )

    def _flags(self) -> tuple[dict[str, bool], dict[str, Any], tuple[str, ...]]:
        """Decide from the files whether the layers have what a flag of the config gives them."""
        flags: dict[str, bool] = {}
        correction: dict[str, Any] = {}
        notes = []
        present = set().union(*self._layers().values())
        for flag, names in self._declared.flagged.items():
            said = bool(self._config.get(flag, False))
            held = names.keys() & present
            whole = len(held) == len(names)
            flags[flag] = whole if whole or not held else said
            if flags[flag] != said:
                correction[flag] = flags[flag]
                has = "have" if whole else "lack"
                notes.append(
                    f"config.json says {flag} {str(said).lower()}, and the layers {has} "
                    f"{min(names)}: the output says {str(whole).lower()}"
                )
        return flags, correction, tuple(notes)

    def _twins(self, *, tied: bool) -> set[str]:
        """Return what the class shares with another tensor, so that the file need not hold it."""
        if not tied:
            return set()
        biases = [name for name in self._adapter.head_biases if name in self._files]
        others = set(self._adapter.head_biases) - set(biases[-1:])
        return {self._adapter.head, *others} if biases else {self._adapter.head}

    def _doubled_bias(self, twins: Collection[str]) -> list[str]:
        """Return a bias that is stored twice with two values: the class computes with the last."""
        stored = [name for name in self._adapter.head_biases if name in self._files]
        if len(stored) < 2 or not twins:
            return []
        known = self._same(*(self._files[name] for name in stored))
        return stored[:-1] if known is False else []

    def _check_missing(self, wanted: Set[str], *, tied: bool, beside: Collection[str]) -> None:
        adapter = self._adapter
        first = adapter.head_required
        missing = sorted(wanted - self._files.keys(), key=lambda name: (name not in first, name))
        if not missing:
            return
        body = (f"{self._declared.prefix}.",)
        if all(not name.startswith(body) for name in missing):
            raise IncompatibleError(
                f"the weights have no {', '.join(missing[:3])}: their language-model head would be "
                "random",
                hint=headless_hint(adapter, self._config, tied=tied, beside=beside),
            )
        inside = [name for name in missing if name.startswith(self._declared.layers)]
        known = self._declared.names(
            self._sizes["num_hidden_layers"], dict.fromkeys(self._declared.flagged, True)
        )
        other = sorted({_rest(name, self._declared) for name in self._layer_names() - known.keys()})
        other = [name for name in other if not is_known_leftover(name)]
        instead = f"; the layers have {', '.join(other[:3])} instead" if inside and other else ""
        lost = _rest(inside[0], self._declared) if inside else missing[0]
        where = "no layer has" if inside else "the weights have no"
        raise IncompatibleError(
            f"{where} {lost} ({len(missing)} tensors of {adapter.stock_class} are missing): it "
            f"would be random{instead}",
            hint=f"Take {stock(adapter)}, complete and under the names of transformers",
        )

    def _layer_names(self) -> set[str]:
        return {name for name in self._files if name.startswith(self._declared.layers)}

    def _check_foreign(self, foreign: Iterable[str], wanted: Collection[str]) -> None:
        found = computed_with(foreign, wanted)
        if found:
            raise IncompatibleError(
                f"the weights have {self._files[found[0]]} ({len(found)} such tensors), which "
                f"{self._adapter.stock_class} does not compute with: it would be another model",
                hint="Take the model_type and config.json that belong to these weights",
            )

    def _check_shapes(
        self, kept: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[str, ...]]
    ) -> None:
        vocabulary = {self._adapter.head, *self._adapter.head_biases}
        for name, tensor in kept.items():
            expected = tuple(self._sizes[size] for size in wanted[name])
            if tensor.shape == expected:
                continue
            if name in vocabulary and tensor.shape[:1] != expected[:1]:
                raise IncompatibleError(
                    f"{name} has shape {tensor.shape}, expected {expected[0]} rows as the embedding"
                )
            raise IncompatibleError(
                f"{name} has shape {tensor.shape}, config.json makes it {expected} "
                f"({' x '.join(wanted[name])})",
                hint=_OTHER_CONFIG,
            )


def _rest(name: str, declared: ClassTensors) -> str:
    return name.removeprefix(declared.layers).partition(".")[2]


def _check_types(kept: Mapping[str, TensorInfo]) -> None:
    for name, tensor in kept.items():
        if tensor.dtype not in FLOATS:
            raise IncompatibleError(
                f"{name} has dtype {tensor.dtype}, expected one of {', '.join(sorted(FLOATS))}"
            )


def _left_out(foreign: Iterable[str], adapter: Adapter) -> tuple[str, ...]:
    """Return a sentence on tensors that are left out and are no known leftovers."""
    unknown = [name for name in foreign if not is_known_leftover(name)]
    if not unknown:
        return ()
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    return (
        f"{unknown[0]}{more} belongs to no part of {adapter.stock_class}, which ignores it: left "
        "out",
    )
