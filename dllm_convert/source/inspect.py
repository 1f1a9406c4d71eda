"""Where weights come from: a folder, a GGUF file or a Hub id, read from headers only."""

from __future__ import annotations

from pathlib import Path

from dllm_convert.common.hub_names import is_hub_id
from dllm_convert.common.json_files import is_pointer, pointer
from dllm_convert.common.nearest import meant
from dllm_convert.errors import DataError, UnknownSourceError
from dllm_convert.source.folder import inspect_folder
from dllm_convert.source.gguf import inspect_gguf
from dllm_convert.source.info import SourceInfo, SourceKind, TensorInfo, TokenizerInfo
from dllm_convert.source.text_model import text_model
from dllm_convert.source.wrong_source import wrong_file

__all__ = ["SourceInfo", "SourceKind", "TensorInfo", "TokenizerInfo", "inspect_source"]


def _inspect_local(path: Path, given: str) -> SourceInfo:
    if path.is_dir():
        return inspect_folder(path, given)
    if path.suffix.lower() == ".gguf":
        if is_pointer(path):
            raise pointer(path.name)
        return inspect_gguf(path, given)
    if is_pointer(path):
        raise pointer(path.name)
    raise wrong_file(path)


def fetch_small(source: str, revision: str | None, names: tuple[str, ...]) -> Path | None:
    """Return a folder with small files of a Hub id at one commit, None if it has none of them.

    Raises:
        HubError: The Hub does not have it, refuses it or cannot be reached.
    """
    # The client of the Hub takes longer to import than a plan takes to make.
    from dllm_convert.source import hub

    return hub.fetch_small(source, revision, names)


def inspect_source(source: str, *, revision: str | None = None) -> SourceInfo:
    """Read everything a plan needs to know of a checkpoint, without loading a weight.

    Of a model that holds a text model inside, that one.

    Args:
        source: An existing folder, an existing `.gguf` file, or a Hub id, tried in that order.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        DataError: Local files are missing, broken or not a checkpoint.
        HubError: The Hub does not have it, refuses it or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise DataError(
                f"{source} is a local path, which has no revision {revision!r}",
                hint="Leave the revision out, or give a Hub id",
            )
        return text_model(_inspect_local(path.resolve(), source))
    if not is_hub_id(source):
        raise UnknownSourceError(
            f"{source!r} does not exist, and is not a Hub id",
            hint=f"{meant(source)}Give a recipe name, a Hub id (owner/name), a folder or a .gguf "
            "file",
        )
    from dllm_convert.source.hub import inspect_hub

    return text_model(inspect_hub(source, revision))
