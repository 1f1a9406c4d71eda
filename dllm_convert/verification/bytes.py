"""What can be proved of a checkpoint from its files alone: no model is built, no torch imported.

Memory stays at a few MiB whatever the size of the weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dllm_convert.adapters import Adapter, adapter_of
from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import pieces, workers
from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.modeling.converted_config import read_converted_config, read_section
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.source.folder import read_config
from dllm_convert.source.source_fit import fit_folder
from dllm_convert.verification.placed import Placed, first_difference, locate
from dllm_convert.verification.probes.hashes import REQUIRED, hashes_probe
from dllm_convert.verification.report import (
    Probe,
    VerificationReport,
    first_items,
    none_wrong,
    skipped,
)
from dllm_convert.weights.mean_row import is_finite

NEEDS_MODEL = (
    *("tokens", "portability", "attention", "gradient", "training", "base-logits", "cache"),
    *("padding", "batch", "generate", "quality", "likelihood"),
)
"""Groups of probes for which the model, or transformers, has to be loaded."""


@dataclass(frozen=True)
class BaseBytes:
    """A checkpoint beside the base it was made from, compared byte by byte.

    Attributes:
        folder: The checkpoint.
        base: Folder of the base's safetensors weights.
        adapter: The family.
        mask_row: Row that the conversion was to overwrite, None if it was to leave all alone.
        known: Files that need no reading, since they were hashed as they were copied.
        trained: Whether tensors may differ; how many do not is measured all the same.
    """

    folder: Path
    base: Path
    adapter: Adapter
    mask_row: int | None
    known: Collection[str] = ()
    trained: bool = False

    def probe(self) -> Probe:
        """Return the probe `base-tensors`."""
        required = "0, the mask's and new rows aside"
        try:
            fit = fit_folder(self.base, self.adapter)
        except IncompatibleError as error:
            return Probe("base-tensors", False, "not the base's tensors", required, str(error))
        ours = locate(self.folder, self.adapter)
        base = locate(self.base, self.adapter, fit.names)
        kept = list(base)
        # Training may store once what the base stores twice.
        free = fit.twins if self.trained else frozenset()
        wrong = [f"{name} of the base is missing" for name in kept if name not in {*ours, *free}]
        if self.trained and wrong:
            measured = f"{len(wrong)} of {len(kept)} tensors missing"
            return Probe("base-tensors", False, measured, required, first_items(wrong))
        pairs = {name: (ours[name], base[name]) for name in kept if name in ours}
        same = [name for name, pair in pairs.items() if self._one_file(*pair)]
        others = pairs.keys() - set(same)
        copied = [name for name in others if pairs[name][0].path.name in self.known]
        read = [name for name in pairs if name in others - set(copied)]
        with ThreadPoolExecutor(workers()) as pool:
            found = pool.map(lambda name: self._difference(name, *pairs[name]), read)
            wrong += [text for text in found if text]
        detail = first_items(wrong)
        if not wrong:
            ways = {"read": read, "in files copied and hashed": copied, "in linked files": same}
            detail = ", ".join(f"{len(names)} {how}" for how, names in ways.items() if names)
        measured = f"{len(wrong)} of {len(kept)} tensors differ"
        if self.trained:
            return Probe("base-tensors", None, measured, required, "the weights were trained")
        return Probe("base-tensors", none_wrong(len(wrong), len(kept)), measured, required, detail)

    @staticmethod
    def _one_file(ours: Placed, base: Placed) -> bool:
        return (ours.start, ours.entry) == (base.start, base.entry) and os.path.samestat(
            ours.path.stat(), base.path.stat()
        )

    def _difference(self, name: str, ours: Placed, base: Placed) -> str:
        mine, other = ours.entry, base.entry
        rows = name in {self.adapter.embedding, self.adapter.head, *self.adapter.head_biases}
        grown = rows and mine.shape[1:] == other.shape[1:] and mine.shape[:1] >= other.shape[:1]
        if mine.dtype != other.dtype:
            return f"{name} is {mine.dtype}, the base's {other.dtype}"
        if mine.shape != other.shape and not grown:
            return f"{name} has shape {mine.shape}, the base's {other.shape}"
        size, row = other.end - other.start, base.row_bytes
        parts = [(0, size)]
        if rows and self.mask_row is not None and self.mask_row < other.shape[0]:
            after = (self.mask_row + 1) * row
            parts = [(0, self.mask_row * row), (after, size - after)]
        for start, length in parts:
            at = first_difference(ours, base, start, length)
            if at is not None:
                return f"{name} differs first in row {at // max(1, row)}"
        return ""


def mask_row_probe(folder: Path, adapter: Adapter, mask_id: int) -> Probe:
    """Return the probe `mask-row`: in the embedding and the head, there, finite and not zero."""
    tensors = locate(folder, adapter)
    wrong, looked = [], 0
    for name in (adapter.embedding, adapter.head):
        if name not in tensors:
            continue
        tensor = tensors[name]
        looked += 1
        if mask_id >= tensor.entry.shape[0]:
            wrong.append(f"{name} has {tensor.entry.shape[0]} rows, the mask's id is {mask_id}")
            continue
        with tensor.path.open("rb", 0) as file:
            start = tensor.start + mask_id * tensor.row_bytes
            read = pieces(file.fileno(), start, tensor.row_bytes)
            row = b"".join(bytes(piece) for piece, _ in read)
        if not any(row) or not is_finite(row, tensor.entry.dtype):
            wrong.append(f"row {mask_id} of {name} is zero or not finite")
    return Probe(
        "mask-row",
        none_wrong(len(wrong), looked),
        f"{len(wrong)} of {looked} rows wrong",
        "0",
        first_items(wrong),
    )


def _weights_probe(folder: Path, adapter: Adapter) -> Probe:
    """Return the probe `weights`: the files hold what the class loads, and nothing else."""
    try:
        fit = fit_folder(folder, adapter)
    except (DataError, IncompatibleError) as error:
        return Probe("weights", False, "not complete", "what the class loads", str(error))
    wrong = [f"{name} belongs to no part of the model" for name in fit.dropped]
    wrong += [
        f"config.json: {key} should be {value!r}"
        for key, value in fit.config.items()
        if key not in ("dtype", "torch_dtype")  # how they are stored is no matter of what they are
    ]
    return Probe(
        "weights",
        not wrong,
        f"{len(wrong)} wrong, {len(fit.names)} tensors described and complete",
        "0, names, shapes and types as the class has them",
        first_items(wrong),
    )


def verify_staged(
    folder: Path,
    base: Path,
    plan: ConversionPlan,
    ways: Mapping[str, str],
    reason: str,
    reporter: Reporter,
) -> VerificationReport:
    """Verify what a run has just written, without loading its model.

    Args:
        folder: The checkpoint.
        base: Folder with the base's safetensors weights.
        plan: The conversion.
        ways: Name of a weight file to how it came about.
        reason: Why the model was not loaded.
        reporter: Progress.
    """
    row = plan.mask.id if plan.mask.write_row else None
    known = [file for file, way in ways.items() if way != "rewritten"]
    with reporter.task("verify files"):
        against = BaseBytes(folder, base, plan.adapter, row, known)
        config = read_config(folder)
        return verify_bytes(
            folder, config, plan.adapter, against=against, hashed=True, reason=reason
        )


def verify_folder(
    folder: Path, base: Path | None, reporter: Reporter, reason: str = "not asked for: --files"
) -> VerificationReport:
    """Verify a converted checkpoint without loading its model, from its own manifest.

    Args:
        folder: The checkpoint.
        base: Folder with the base's safetensors weights, None to compare with none.
        reporter: Progress.
        reason: Why the model is not loaded.

    Raises:
        DataError: There is no such folder, or no config in it.
        IncompatibleError: It is no diffusion checkpoint.
        UnsupportedError: Its family is not known.
    """
    config = read_converted_config(folder)
    adapter = adapter_of(config)
    manifest = read_manifest(folder, any_version=True) if (folder / MANIFEST_FILE).exists() else {}
    section = read_section(config)
    mask = ((manifest.get("plan") or {}).get("mask") or {}).get("write_row", True)
    trained = ((manifest.get("recipe") or {}).get("training") or {}).get("method") != "none"
    # Where the base is kept its weights are never trained, and have no row for the mask.
    trained = trained and not section.is_gated
    row = section.mask_token_id if mask and not section.is_gated else None
    with reporter.task("verify files"):
        return verify_bytes(
            folder,
            config,
            adapter,
            against=BaseBytes(folder, base, adapter, row, trained=trained) if base else None,
            hashed=False,
            reason=reason,
        )


def verify_bytes(
    folder: Path,
    config: Mapping[str, Any],
    adapter: Adapter,
    *,
    against: BaseBytes | None,
    hashed: bool,
    reason: str,
) -> VerificationReport:
    """Verify a checkpoint without loading its model.

    Args:
        folder: The checkpoint.
        config: Its config.json.
        adapter: Its family.
        against: The comparison with its base, None if there is none to compare with.
        hashed: Whether its files were hashed as they were written.
        reason: Why the other probes are not run.
    """
    started = time.monotonic()
    probes = [_weights_probe(folder, adapter)]
    if probes[0].passed:
        section = read_section(config)
        if section.is_gated:
            probes.append(skipped("mask-row", "0", "a vector in adapter/ stands for the mask"))
        else:
            probes.append(mask_row_probe(folder, adapter, section.mask_token_id))
        if against is None:
            probes.append(skipped("base-tensors", "0", "no base to compare with: --against SOURCE"))
        else:
            probes.append(against.probe())
    if hashed:
        taken = "they were taken from the bytes as these were written"
        probes.append(skipped("hashes", REQUIRED, taken))
    else:
        probes.append(hashes_probe(folder))
    probes += map(partial(skipped, required="to be measured", reason=reason), NEEDS_MODEL)
    return VerificationReport(tuple(probes), round(time.monotonic() - started, 3))
