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
from dllm_convert.common.console import Reporter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.hub_names import is_model_id
from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest
from dllm_convert.common.memory import in_words
from dllm_convert.common.nearest import meant, no_folder
from dllm_convert.errors import DataError, IncompatibleError, UnsupportedError
from dllm_convert.modeling.converted_config import read_converted_config, read_section
from dllm_convert.source.folder import SMALL_FILES
from dllm_convert.source.safetensors_header import INDEX_FILE, load_json_object, read_checkpoint
from dllm_convert.verification.accelerator import Accelerator
from dllm_convert.verification.foreign import ForeignLayout, all_layouts, find_layout
from dllm_convert.verification.foreign.claim import read_claim
from dllm_convert.verification.foreign.probes import Foreign
from dllm_convert.verification.foreign.view import build_view, stand_in, stock_config
from dllm_convert.verification.memory import model_refusal
from dllm_convert.verification.subject import Subject

_HUB_FILES = ("*.safetensors", INDEX_FILE, MANIFEST_FILE, "*.py", "adapter_config.json")


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


def local_checkpoint(checkpoint: Path | str, revision: str | None, reporter: Reporter) -> Path:
    """Return the folder of a checkpoint, downloaded if it is a Hub id.

    Args:
        checkpoint: An existing folder, or a Hub id `owner/name`.
        revision: Branch, tag or commit of a Hub id.
        reporter: Says what is downloaded.

    Raises:
        DataError: It is neither, or a revision is given for a folder.
        HubError: The Hub does not have it, refuses it or cannot be reached.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        if revision is not None:
            raise DataError(
                f"{folder} is a folder, which has no revision {revision!r}",
                hint="Leave --revision out, or give a Hub id",
            )
        return folder
    repo_id = checkpoint if isinstance(checkpoint, str) else checkpoint.as_posix()
    if folder.exists():
        raise no_folder(folder)
    if not is_model_id(repo_id, owned=True):
        raise DataError(
            f"{checkpoint} is not a folder, and is not a Hub id",
            hint=f"{meant(folder)}Give a folder with config.json beside the weights, or a Hub id "
            "(owner/name)",
        )
    from huggingface_hub import snapshot_download

    from dllm_convert.source.hub_errors import hub_errors

    reporter.line(f"download {repo_id}" + (f" at {revision}" if revision else ""))
    # Code comes along to be compared with ours; downloading it runs nothing.
    with hub_errors(repo_id, revision):
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=[*SMALL_FILES, *_HUB_FILES]
            )
        )


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
