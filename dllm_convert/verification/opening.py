"""Open what is to be verified: a folder of ours, or one of another project, or a Hub id."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.adapters import adapter_of, all_adapters
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest
from dllm_convert.common.memory import in_words
from dllm_convert.errors import DataError, IncompatibleError, UnsupportedError
from dllm_convert.modeling.converted_config import read_converted_config, read_section
from dllm_convert.source.safetensors_header import load_json_object, read_checkpoint
from dllm_convert.verification.accelerator import Accelerator
from dllm_convert.verification.foreign import ForeignLayout, all_layouts, find_layout
from dllm_convert.verification.foreign.claim import read_claim
from dllm_convert.verification.foreign.probes import Foreign
from dllm_convert.verification.foreign.view import build_view, stand_in, stock_config
from dllm_convert.verification.memory import model_refusal
from dllm_convert.verification.subject import Subject


@dataclass(frozen=True)
class VerificationRequest:
    """What the caller of a verification says beside the checkpoint.

    Attributes:
        against: Folder with the base's safetensors weights.
        quality: Held-out measurements; None for those of the manifest.
        untrained: Whether the weights are the base's; None for what the manifest says.
        trust_remote_code: Whether code of the folder that is not ours may run.
        block_size: Tokens per block of a checkpoint that does not say so itself.
        accelerator: Where the checkpoint will be used; None for the CPU, in float32.
    """

    against: Path | None = None
    quality: Mapping[str, Any] | None = None
    untrained: bool | None = None
    trust_remote_code: bool = False
    block_size: int | None = None
    accelerator: Accelerator | None = None


@contextmanager
def opened(folder: Path, asked: VerificationRequest) -> Iterator[Subject]:
    """Open a checkpoint folder for verification.

    Raises:
        DataError: There is no such folder, or no config in it.
        IncompatibleError: It is no diffusion checkpoint, or one that contradicts itself.
        UnsupportedError: Its family or layout is not known.
    """
    path = folder / "config.json"
    config = load_json_object(path) if path.is_file() else {}
    layout = find_layout(config) if diffusion_section(config) is None else None
    if layout is None:
        yield _ours(folder, config, asked)
        return
    with tempfile.TemporaryDirectory(prefix="dllm-convert-verify-") as name:
        yield _foreign(folder, config, layout, asked, Path(name))


def _ours(folder: Path, config: Mapping[str, Any], asked: VerificationRequest) -> Subject:
    kind = config.get("model_type")
    families = {adapter.model_type for adapter in all_adapters()}
    if isinstance(kind, str) and kind not in families and "diffusion" not in config:
        known = ", ".join(layout.name for layout in all_layouts())
        raise UnsupportedError(
            f"{folder} has no 'diffusion' section, and model_type {kind!r} is of none of the "
            f"third-party layouts that are known: {known}",
            hint="See docs/third-party.md",
        )
    config = read_converted_config(folder)
    adapter = adapter_of(config)
    claim = read_section(config)
    if asked.block_size is not None:
        raise IncompatibleError(
            f"--block {asked.block_size} was given, and config.json says itself what it is",
            hint="Leave --block out",
        )
    manifest = read_manifest(folder, any_version=True) if (folder / MANIFEST_FILE).exists() else {}
    untrained = asked.untrained
    if untrained is None:
        method = ((manifest.get("recipe") or {}).get("training") or {}).get("method")
        untrained = None if method is None else method == "none"
    return Subject(
        folder=folder,
        config=config,
        adapter=adapter,
        claim=claim,
        manifest=manifest,
        against=asked.against,
        quality=asked.quality if asked.quality is not None else manifest.get("measurements") or {},
        untrained=untrained,
        trust_remote_code=asked.trust_remote_code,
        accelerator=asked.accelerator,
    )


def _foreign(
    folder: Path,
    config: Mapping[str, Any],
    layout: ForeignLayout,
    asked: VerificationRequest,
    view: Path,
) -> Subject:
    stated = read_claim(layout, folder, config, asked.block_size)
    unmapped = layout.unmet(config) or _no_room_to_rename(layout, folder, view)
    adapter = stand_in(layout, unmapped=unmapped is not None)
    own_config = stock_config(layout, adapter, config, stated)
    build_view(view, folder, own_config, stated, layout, rename=unmapped is None)
    return Subject(
        folder=view,
        config=own_config,
        adapter=adapter,
        claim=stated.claim,
        manifest={},
        against=asked.against,
        quality=asked.quality or {},
        untrained=asked.untrained,
        trust_remote_code=asked.trust_remote_code,
        foreign=Foreign(folder, config, layout, stated, unmapped),
        accelerator=asked.accelerator,
    )


def _no_room_to_rename(layout: ForeignLayout, folder: Path, view: Path) -> str | None:
    """Return why the weights cannot be copied under stock names, None if they can or need not.

    What does not fit memory afterwards is not copied in the first place.
    """
    if not layout.renames:
        return None
    try:
        headers = read_checkpoint(folder)
    except DataError:
        return None  # the probe `weights` says what is wrong with them
    needed = sum((folder / file).stat().st_size for file in headers)
    free = shutil.disk_usage(view).free
    if needed > free:
        return (
            f"a copy under stock names needs {in_words(needed)} in {view.parent}, "
            f"{in_words(free)} are free"
        )
    return model_refusal(headers, copies=1)
