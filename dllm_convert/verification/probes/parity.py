"""Parity with the base: the conversion left its weights alone, and they compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dllm_convert.errors import DataError
from dllm_convert.modeling.loading import load_base
from dllm_convert.source.fit import is_tied
from dllm_convert.source.folder import read_config
from dllm_convert.source.safetensors_header import Header, read_checkpoint
from dllm_convert.source.source_fit import fit_folder
from dllm_convert.source.tensor_names import stored_names
from dllm_convert.source.text_model import inner_names
from dllm_convert.source.tokenizer_loading import load_tokenizer
from dllm_convert.verification.instruments.divergence import Trace
from dllm_convert.verification.probes.base_config import check_base_config
from dllm_convert.verification.report import Probe, first_items, largest, none_wrong, skipped
from dllm_convert.verification.subject import Subject

LENGTH = 32
_ROWS_AT_ONCE = 1 << 13
GROWN_HEAD_TOLERANCE = 1e-6
"""Share of the largest logit by which logits may differ where the head has more rows: a matrix
product of another shape may add in another order. (None was seen to; other machines may.)"""


def check_parity(subject: Subject) -> list[Probe]:
    """Return the probes `base-config`, `base-tensors` and `base-logits`."""
    names = ("base-config", "base-tensors", "base-logits")
    if subject.against is None:
        reason = "no base to compare with: verify with --against SOURCE"
        return [skipped(name, "0", reason) for name in names]
    comparison = _Comparison(subject, subject.against)
    config = check_base_config(subject, subject.against)
    if subject.claim.is_gated:
        # The weights are the base's, however long the adapter was trained.
        return [config, comparison.tensors(), comparison.logits()]
    if subject.untrained is None:
        reason = "not known whether the weights were trained: the folder has no manifest"
        return [config, comparison.shapes(), skipped("base-logits", "0", reason)]
    if not subject.untrained:
        reason = "the weights were trained"
        return [config, comparison.shapes(), skipped("base-logits", "0", reason)]
    return [config, comparison.tensors(), comparison.logits()]


@dataclass(frozen=True)
class _Located:
    """A tensor in a file, with its name there."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _locate(
    folder: Path, headers: Mapping[str, Header], names: Mapping[str, str]
) -> dict[str, _Located]:
    """Return the tensors of a folder under the names their class knows them by.

    Args:
        folder: The folder.
        headers: Headers of its files.
        names: Name in the files to name in the class, of the tensors that are wanted.
    """
    return {
        names[name]: _Located(folder / file, name, entry.shape, entry.dtype)
        for file, header in headers.items()
        for name, entry in header.entries.items()
        if name in names
    }


def _rows(tensor: _Located, count: int) -> Iterator[torch.Tensor]:
    """Read the first `count` rows in pieces, shape (rows, ...), without the whole tensor."""
    with safe_open(tensor.path, framework="pt") as shard:
        part = shard.get_slice(tensor.name)
        for first in range(0, count, _ROWS_AT_ONCE):
            yield part[first : min(first + _ROWS_AT_ONCE, count)]


def _unequal_rows(ours: _Located, base: _Located) -> set[int]:
    """Return the rows of the base that differ in ours, bytes compared."""
    if not base.shape:
        with safe_open(ours.path, "pt") as left, safe_open(base.path, "pt") as right:
            same = torch.equal(left.get_tensor(ours.name), right.get_tensor(base.name))
        return set() if same else {0}
    unequal: set[int] = set()
    first = 0
    pairs = zip(_rows(ours, base.shape[0]), _rows(base, base.shape[0]), strict=True)
    for left, right in pairs:
        bits = [
            part.contiguous().view(torch.uint8).reshape(len(part), -1) for part in (left, right)
        ]
        different = (bits[0] != bits[1]).any(dim=-1).nonzero().flatten()
        unequal.update((different + first).tolist())
        first += len(left)
    return unequal


class _Comparison:
    """A checkpoint beside the base it was made from."""

    def __init__(self, subject: Subject, base: Path) -> None:
        self._subject = subject
        self._base_folder = base
        adapter = subject.adapter
        self._ours = _locate(subject.folder, subject.headers, stored_names(subject.shapes, adapter))
        self._vocabulary = {adapter.embedding, adapter.head, *adapter.head_biases}
        base_headers = read_checkpoint(base)
        held = [name for header in base_headers.values() for name in header.entries]
        stored = set(inner_names(read_config(base), held).values())
        # Of a tied pair either may be the one that is stored.
        if {adapter.embedding, adapter.head}.isdisjoint(stored_names(stored, adapter).values()):
            raise DataError(
                f"{base} has no tensor {adapter.embedding}, so it is not the base of this "
                f"{adapter.model_type} checkpoint"
            )
        fit = fit_folder(base, adapter)
        self._base = _locate(base, base_headers, fit.names)
        self._twins = fit.twins
        self._base_rows = self._base[adapter.embedding].shape[0]

    def _misshapen(self, ours: _Located, base: _Located, name: str) -> bool:
        if name in self._vocabulary and ours.shape and base.shape:
            return ours.shape[1:] != base.shape[1:] or ours.shape[0] < base.shape[0]
        return ours.shape != base.shape

    def _wrong_shapes(self) -> list[str]:
        common = self._ours.keys() & self._base.keys()
        return [
            f"{name} has shape {self._ours[name].shape}, the base's {self._base[name].shape}"
            for name in sorted(common)
            if self._misshapen(self._ours[name], self._base[name], name)
        ]

    def _wrong_names(self) -> list[str]:
        """Return what only one of both has; what is tied to another tensor may be stored or not."""
        free = {*self._twins, *self._subject.adapter.head_biases}
        if is_tied(self._subject.config, self._subject.adapter):
            free.add(self._subject.adapter.head)
        missing = self._base.keys() - self._ours.keys() - free
        added = self._ours.keys() - self._base.keys() - free
        return [f"{name} of the base is missing" for name in sorted(missing)] + [
            f"{name} is no tensor of the base" for name in sorted(added)
        ]

    def shapes(self) -> Probe:
        """Compare names and shapes only: all that training leaves alone."""
        wrong = self._wrong_shapes() + self._wrong_names()
        common = len(self._ours.keys() & self._base.keys())
        return Probe(
            "base-tensors",
            none_wrong(len(wrong), common),
            f"{len(wrong)} of {common} tensors misshapen",
            "0 misshapen, missing or added, new rows aside",
            first_items(wrong),
        )

    def tensors(self) -> Probe:
        """Compare bytes."""
        wrong = self._wrong_shapes()
        kept = self._base.keys()
        wrong += [f"{name} of the base is missing" for name in sorted(kept - self._ours.keys())]
        if not wrong:
            wrong = [text for name in self._base if (text := self._difference(name))]
        return Probe(
            "base-tensors",
            none_wrong(len(wrong), len(kept)),
            f"{len(wrong)} of {len(kept)} tensors differ",
            "0, the mask's and new rows aside",
            first_items(wrong),
        )

    def _difference(self, name: str) -> str:
        ours, base = self._ours[name], self._base[name]
        if ours.dtype != base.dtype:
            return f"{name} is {ours.dtype}, the base's {base.dtype}"
        unequal = _unequal_rows(ours, base)
        if name in self._vocabulary and self._mask_row_is_new():
            unequal -= {self._subject.claim.mask_token_id}
        return f"{name} differs in {len(unequal)} rows, first {min(unequal)}" if unequal else ""

    def _mask_row_is_new(self) -> bool:
        plan = self._subject.manifest.get("plan") or {}
        return bool((plan.get("mask") or {}).get("write_row", True))

    def logits(self) -> Probe:
        """Run base and conversion under one mask; compare the base's vocabulary."""
        self._check_same_tokenizer()
        adapter = self._subject.adapter
        tokens = self._subject.tokens(2, min(LENGTH, self._subject.context))
        inputs: dict[str, Any] = {"input_ids": tokens}
        if adapter.attention == "causal" and self._subject.claim.behind == "mask":
            # Given to both as it is: a window of the base's is no matter of its weights.
            length = tokens.shape[1]
            mask = torch.ones(length, length).tril().bool()[None, None]
            if adapter.implementations[0] == "eager":
                # Eager attention of the stock class adds its mask to the scores.
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            inputs["attention_mask"] = mask
        if adapter.auto_class == "AutoModelForCausalLM":
            inputs["use_cache"] = False
        base = load_base(self._base_folder, adapter)
        trace = Trace(base, inputs, base.get_output_embeddings())
        logits, wrong, first = trace.compare(self._subject.model, inputs)
        kept = torch.arange(self._base_rows)
        kept = kept[kept != self._subject.claim.mask_token_id]
        difference = largest([logits[..., kept] - trace.logits[..., kept]])
        grown = logits.shape[-1] > trace.logits.shape[-1]
        limit = GROWN_HEAD_TOLERANCE * float(trace.logits.abs().max()) if grown else 0.0
        return Probe(
            "base-logits",
            difference <= limit and not wrong,
            f"{wrong} of {len(trace)} module outputs differ, logits by {difference:.3g}",
            f"0 modules, {limit:.2g}",
            first and f"the first is {first}",
        )

    def _check_same_tokenizer(self) -> None:
        base = load_tokenizer(self._base_folder)
        if len(base) > len(self._subject.tokenizer):
            raise DataError(
                f"the base's tokenizer has {len(base)} tokens, this one only "
                f"{len(self._subject.tokenizer)}"
            )
