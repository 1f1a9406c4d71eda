"""The adapter alone: a small repository that turns the base into the diffusion model."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from dllm_convert.console import Reporter
from dllm_convert.errors import DataError
from dllm_convert.manifest import MANIFEST_FILE, hash_files, read_manifest, write_manifest
from dllm_convert.publish.staging import (
    ADAPTER,
    CARD_FILE,
    check_recorded,
    is_weight,
    link,
    published_names,
)

ADAPTER_CONFIG = "adapter_config.json"


def adapter_checkpoint(folder: Path, out: Path, reporter: Reporter) -> None:
    """Build the folder of an adapter: PEFT's files beside the code, config and tokenizer.

    The base's weights are not in it; the card shows how both are loaded together. Loaded as a plain
    PEFT adapter on the stock class it would be a causal model, which the card says.

    Args:
        folder: A checkpoint trained with LoRA that kept its adapter.
        out: New folder.
        reporter: Progress.

    Raises:
        DataError: There is no adapter, or a file differs from the manifest.
    """
    manifest = read_manifest(folder)
    if not (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        raise DataError(
            f"{folder} has no {ADAPTER}/{ADAPTER_CONFIG}, which --adapter-only publishes",
            hint="Convert again with `run … --lora R --keep-adapter`, or publish without it",
        )
    recorded = dict(manifest.get("files") or {})
    out.mkdir(parents=True)
    with reporter.task("compare with the manifest"):
        for name in published_names(folder, recorded):
            if is_weight(name) or name == CARD_FILE:
                continue
            check_recorded(folder, name, recorded)
            target = name.removeprefix(f"{ADAPTER}/")
            if not fnmatch(target, "*.png"):
                link(folder / name, out / target)
    (out / MANIFEST_FILE).unlink()
    files = hash_files(out, exclude=(MANIFEST_FILE, CARD_FILE))
    write_manifest(out, manifest | {"adapter_only": True, "files": files})
