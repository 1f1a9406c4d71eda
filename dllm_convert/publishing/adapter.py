"""The adapter alone: a small repository that turns the base into the diffusion model."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dllm_convert.adapters import adapter_of
from dllm_convert.card.pictures import DENOISING
from dllm_convert.common.console import Reporter
from dllm_convert.common.disk import link
from dllm_convert.common.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    WRITTEN_LAST,
    hash_files,
    read_manifest,
    write_manifest,
)
from dllm_convert.errors import DataError
from dllm_convert.modeling.converted_config import read_converted_config, read_section
from dllm_convert.publishing.staging import check_recorded, is_weight, published_names
from dllm_convert.training.adapter_files import ADAPTER

ADAPTER_CONFIG = "adapter_config.json"
SCRIPT = Path(__file__).with_name("_adapter_process.py")


def adapter_checkpoint(folder: Path, out: Path, reporter: Reporter) -> None:
    """Build the folder of an adapter: PEFT's files beside the code, config and tokenizer.

    The base's weights are not in it; the card shows how both are loaded together. Loaded as a plain
    PEFT adapter on the stock class it would be a causal model, which the card says. A gated adapter
    stays in its folder: it is no adapter of PEFT's.

    Args:
        folder: A checkpoint trained with LoRA that kept its adapter.
        out: New folder.
        reporter: Progress.

    Raises:
        DataError: There is no adapter, or a file differs from the manifest.
    """
    manifest, gated = read_manifest(folder), _is_gated(folder)
    if not (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        raise DataError(
            f"{folder} has no {ADAPTER}/{ADAPTER_CONFIG}, which --adapter-only publishes",
            hint="Convert again with `run … --lora R --keep-adapter`, or publish without it",
        )
    recorded = dict(manifest.get("files") or {})
    out.mkdir(parents=True)
    with reporter.task("compare with the manifest"):
        for name in published_names(folder, recorded):
            if is_weight(name) or name in (CARD_FILE, REPORT_FILE):
                continue
            check_recorded(folder, name, recorded)
            # At the top of a folder transformers would put it on the base without a gate.
            target = name if gated else name.removeprefix(f"{ADAPTER}/")
            if not fnmatch(target, "*.png") and target != DENOISING.file:
                (out / target).parent.mkdir(parents=True, exist_ok=True)
                link(folder / name, out / target)
    (out / MANIFEST_FILE).unlink()
    files = hash_files(out, exclude=WRITTEN_LAST)
    write_manifest(out, manifest | {"adapter_only": True, "files": files})


def _is_gated(folder: Path) -> bool:
    return read_section(read_converted_config(folder)).is_gated


def check_adapter(adapter: Path, merged: Path, scratch: Path, reporter: Reporter) -> dict[str, Any]:
    """Put the base and a downloaded adapter together in a fresh process; compare with the weights.

    Args:
        adapter: The downloaded adapter repository.
        merged: The checkpoint it was taken from.
        scratch: Folder the process may write to.
        reporter: Progress.

    Returns:
        A probe: name, passed (None if the base that was converted is not here any more), measured,
        required, detail.
    """
    from dllm_convert.source.materialise import materialise
    from dllm_convert.source.recorded import recorded_base
    from dllm_convert.verification.probes.portability import run_isolated

    family = adapter_of(read_converted_config(merged))
    probe = {
        "name": "adapter",
        "required": f"logits within {family.tolerance:g} of the merged weights",
        "detail": "",
    }
    try:
        info = recorded_base(read_manifest(merged))
    except DataError as error:
        return probe | {"passed": None, "measured": "not measured", "detail": error.message}
    base = materialise(info, reporter).folder
    places = (adapter.resolve(), base.resolve(), merged.resolve())
    command = [sys.executable, "-I", str(SCRIPT), *map(str, places)]
    with reporter.task("put base and adapter together"):
        try:
            said = run_isolated([*command, family.diffusion_class], scratch)
        except DataError as error:
            failed = {"passed": False, "measured": "does not load", "detail": error.message}
            return probe | failed
    difference = float(said.split()[-1])
    measured = f"logits differ by {difference:.3g}"
    return probe | {"passed": difference <= family.tolerance, "measured": measured}
