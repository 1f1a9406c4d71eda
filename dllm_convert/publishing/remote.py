"""What a repository on the Hub holds, and how that differs from what is to be published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.copying import sha256_file
from dllm_convert.common.manifest import (
    CARD_FILE,
    EXPORT_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    checkpoint_files,
    git_blob,
    read_manifest,
)
from dllm_convert.common.redaction import last_part
from dllm_convert.errors import DataError, HubError
from dllm_convert.publishing.export_record import read_record

OWN_FILES = (".gitattributes", ".gitignore", CARD_FILE)
"""Files a repository may hold before anything was published: the Hub or its owner made them."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at a commit.

    Attributes:
        size: Bytes.
        blob: Git blob id; of a large file that of its pointer.
        sha256: SHA-256 of the content, None for a file that git holds itself.
    """

    size: int
    blob: str
    sha256: str | None

    def equals(self, path: Path, sha256: str | None = None) -> bool:
        """Whether a local file has the same content.

        Args:
            path: The local file; read only if the sizes agree.
            sha256: Its SHA-256 if that is known already, to save reading it.
        """
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return (sha256 or sha256_file(path)) == self.sha256
        return git_blob(path) == self.blob


@dataclass(frozen=True)
class RemoteState:
    """A repository at one commit.

    Attributes:
        repo_id: Its id, with the namespace.
        commit: 40 hex digits.
        private: Whether only its owner sees it.
        files: Path to file.
        manifest: Content of its dllm_convert.json, None if there is none.
    """

    repo_id: str
    commit: str
    private: bool
    files: Mapping[str, RemoteFile]
    manifest: Mapping[str, Any] | None


@dataclass(frozen=True)
class PushChanges:
    """What a push has to do.

    Attributes:
        upload: Names of files that are missing or differ there.
        delete: Names of files an earlier push put there and this checkpoint does not have.
        size: Bytes of the files to upload.
    """

    upload: tuple[str, ...]
    delete: tuple[str, ...]
    size: int

    def __bool__(self) -> bool:
        """Whether anything has to be done."""
        return bool(self.upload or self.delete)


def read_remote(
    repo_id: str, revision: str, scratch: Path, record: str = MANIFEST_FILE
) -> RemoteState:
    """List a repository at the commit a revision stands for now.

    Args:
        repo_id: Repository.
        revision: Branch, tag, commit or `refs/pr/N`.
        scratch: Folder to download the manifest into.
        record: Where what is pushed says what it holds; a conversion's manifest is read where an
            export is to take its place.

    Raises:
        huggingface_hub errors, to be read by `hub_errors`.
    """
    from huggingface_hub import HfApi, RepoFile

    api = HfApi()
    info = api.model_info(repo_id, revision=revision)
    commit = str(info.sha)
    files = {
        entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in api.list_repo_tree(repo_id, revision=commit, recursive=True)
        if isinstance(entry, RepoFile)
    }
    manifest = None
    name = next((name for name in (record, MANIFEST_FILE) if name in files), None)
    if name is not None:
        path = Path(api.hf_hub_download(repo_id, name, revision=commit, cache_dir=scratch))
        try:
            conversion = name == MANIFEST_FILE
            manifest = read_manifest(path.parent) if conversion else read_record(path)
        except DataError:
            manifest = {}
    return RemoteState(repo_id, commit, bool(info.private), files, manifest)


def refuse_foreign(remote: RemoteState, staged: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse to write over what somebody else put there.

    A repository may hold nothing but its own files, an earlier push of a conversion of the same
    base, or part of this very push.

    Args:
        remote: The repository.
        staged: What is to be published.
        manifest: The manifest of what is to be published.

    Raises:
        HubError: It holds something else.
    """
    hint = "Give another repository, or move its content away first"
    if remote.manifest is None:
        foreign = [
            name
            for name, file in remote.files.items()
            if name not in OWN_FILES and not file.equals(staged / name, _recorded(manifest, name))
        ]
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise HubError(
                f"{remote.repo_id} holds files that dllm-convert did not put there: "
                f"{min(foreign)}{more}",
                hint=hint,
            )
        return
    theirs = remote.manifest.get("source") or {}
    there, here = base_name(theirs), base_name(manifest["source"])
    if there != here:
        raise HubError(
            f"{remote.repo_id} holds a conversion of {there or 'something unknown'}, not of {here}",
            hint=hint,
        )


def base_name(source: Mapping[str, Any]) -> str:
    """Return the base's Hub id, or the name of the file or folder it was read from.

    Args:
        source: The `source` section of a manifest.
    """
    given = source.get("given") or source.get("name") or ""
    return str(source.get("repo_id") or last_part(str(given)))


def keeps_card(remote: RemoteState) -> bool:
    """Whether the repository's README.md was written or edited by a person, not by a push.

    A push records the hash of the card it generated; any other content is somebody's work.
    """
    if CARD_FILE not in remote.files:
        return False
    recorded = (remote.manifest or {}).get("card") or {}
    return recorded.get("blob") != remote.files[CARD_FILE].blob


def _recorded(manifest: Mapping[str, Any], name: str) -> str | None:
    digest = (manifest.get("files") or {}).get(name)
    return digest if isinstance(digest, str) else None


def compare(remote: RemoteState, staged: Path, manifest: Mapping[str, Any]) -> PushChanges:
    """Return what is missing, different or left over in a repository.

    Args:
        remote: The repository.
        staged: What is to be published.
        manifest: Its manifest, whose hashes were compared with the files when it was staged.
    """
    names = checkpoint_files(staged)
    found = remote.files
    upload = tuple(
        name
        for name in names
        if name not in found or not found[name].equals(staged / name, _recorded(manifest, name))
    )
    ours = {MANIFEST_FILE, *((remote.manifest or {}).get("files") or {})}
    if EXPORT_FILE in names:
        # On a branch of a conversion's repository everything of that is there at first.
        ours.add(REPORT_FILE)
    delete = tuple(sorted(name for name in ours & found.keys() if name not in set(names)))
    return PushChanges(upload, delete, sum((staged / name).stat().st_size for name in upload))
