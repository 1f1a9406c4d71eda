"""See a Hub repository through its small files and headers, pinned to one commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dllm_convert.source.base_card import base_card, read_base_card
from dllm_convert.source.folder import (
    ALL_PICKLES,
    LICENCE_FILES,
    PICKLE_FILES,
    PICKLE_WARNING,
    SMALL_FILES,
    matching,
    read_config,
    read_generation,
    tokenizer_of,
)
from dllm_convert.source.hub_errors import hub_errors, transport_error
from dllm_convert.source.hub_headers import read_hub_tensors
from dllm_convert.source.info import SourceInfo, TensorInfo
from dllm_convert.source.safetensors_header import INDEX_FILE, SINGLE_FILE
from dllm_convert.source.tokenizer_files import VOCABULARY_FILES
from dllm_convert.source.wrong_source import no_config, no_weights

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


def _cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Return the snapshot folder of an earlier download, None if there is none."""
    from huggingface_hub import errors, hf_hub_download

    try:
        config = hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return None
    return Path(config).parent


def _ask(repo_id: str, revision: str | None) -> ModelInfo | Path:
    """Return what the Hub says of a repository; where it cannot be reached, the cached snapshot."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().model_info(repo_id, revision=revision)
    except (errors.OfflineModeIsEnabled, transport_error()) as error:
        cached = None if getattr(error, "response", None) else _cached_snapshot(repo_id, revision)
        if cached is None:
            raise
        return cached


def _names(info: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or ()]


def fetch_small(repo_id: str, revision: str | None, wanted: tuple[str, ...]) -> Path | None:
    """Return a folder with those of a few small files that a repository has at one commit.

    None if it has none of them.

    Raises:
        HubError: The Hub does not have it, refuses it or cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id, revision):
        info = _ask(repo_id, revision)
        if isinstance(info, Path):
            return info
        folder = None
        for name in sorted({*wanted}.intersection(_names(info))):
            folder = Path(hf_hub_download(repo_id, name, revision=str(info.sha))).parent
    return folder


def _weights(
    repo_id: str, commit: str, names: list[str]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors and the names of the weight files, headers read by ranged requests."""
    if SINGLE_FILE not in names and INDEX_FILE not in names:
        pickles = matching(names, ALL_PICKLES)
        if matching(names, PICKLE_FILES):
            return {}, pickles
        raise no_weights(repo_id, names)
    return read_hub_tensors(repo_id, commit, names)


def _needed(small: list[str], *, card: bool) -> list[str]:
    """Choose what a plan reads of the small files; the rest comes with the weights.

    Args:
        small: Files of the repository that are no weights.
        card: Whether the card has to be read for what the Hub does not say of it.
    """
    vocabulary = next((name for name in VOCABULARY_FILES if name in small), None)
    unread = {*VOCABULARY_FILES, "merges.txt", *matching(small, LICENCE_FILES)} - {vocabulary}
    if not card:
        unread.add("README.md")
    return [name for name in small if name not in unread]


def _inspect_cached(repo_id: str, folder: Path) -> SourceInfo:
    """Read a snapshot of the local cache, where the Hub cannot be asked."""
    from dataclasses import replace

    from dllm_convert.source.folder import inspect_folder

    info = inspect_folder(folder, repo_id)
    return replace(
        info,
        kind="hub",
        repo_id=repo_id,
        revision=folder.name,
        fingerprint={"commit": folder.name},
        warnings=(*info.warnings, "the Hub cannot be reached: using the copy in the local cache"),
    )


def inspect_hub(repo_id: str, revision: str | None) -> SourceInfo:
    """Read what a plan needs from a Hub repository; downloads kilobytes, not weights.

    Raises:
        HubError: The Hub does not have it, refuses it or cannot be reached.
        DataError: The repository is not a checkpoint.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id, revision):
        info = _ask(repo_id, revision)
        if isinstance(info, Path):
            return _inspect_cached(repo_id, info)
        commit, names = str(info.sha), _names(info)
        if "config.json" not in names:
            raise no_config(repo_id, names, None)
        small = matching(names, SMALL_FILES)
        stated = vars(info.card_data) if info.card_data else None
        folder = Path()
        for name in _needed(small, card=stated is None):
            path = Path(hf_hub_download(repo_id, name, revision=commit))
            folder = path.parents[name.count("/")]
        config = read_config(folder)
        tokenizer = tokenizer_of(folder, config)
        tensors, weights = _weights(repo_id, commit, names)
    card = base_card(stated) if stated else read_base_card(folder / "README.md")
    return SourceInfo(
        given=repo_id,
        kind="hub",
        path=None,
        repo_id=repo_id,
        revision=commit,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        card=card,
        fingerprint={"commit": commit},
        files=(*weights, *small),
        beside=tuple(sorted(names)),
        warnings=() if tensors else (PICKLE_WARNING,),
        gated=info.gated or ("no" if info.gated is False else None),
        generation=read_generation(folder),
    )
