"""A checkpoint of ours by its folder or by its name on the Hub."""

from __future__ import annotations

from pathlib import Path

from dllm_convert.common.console import Reporter
from dllm_convert.common.diffusion_section import NEIGHBOURS_FILE
from dllm_convert.common.hub_names import is_hub_id, is_model_id
from dllm_convert.common.manifest import MANIFEST_FILE
from dllm_convert.common.nearest import meant, no_folder
from dllm_convert.errors import DataError
from dllm_convert.source.folder import SMALL_FILES
from dllm_convert.source.safetensors_header import INDEX_FILE

_HUB_FILES = (
    *("*.safetensors", INDEX_FILE, MANIFEST_FILE, "*.py", NEIGHBOURS_FILE),
    *("adapter_config.json", "*/adapter_config.json"),  # one at the top is a fault to be found
)


def checkpoint_folder(
    checkpoint: Path | str, reporter: Reporter, revision: str | None = None
) -> Path:
    """Return a checkpoint's folder, downloaded if what is named is a Hub id and no folder.

    Args:
        checkpoint: Folder or Hub id; what is neither is returned as it is, and opening it says what
            is missing. A Path is never an id.
        reporter: Says what is downloaded.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        DataError: A revision is given for a folder.
        HubError: The Hub does not have it, refuses it or cannot be reached.
    """
    named = isinstance(checkpoint, str) and "/" in checkpoint and is_hub_id(checkpoint)
    if revision is None and not named:
        return Path(checkpoint)
    return local_checkpoint(checkpoint, revision, reporter)


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
