"""What the loopback Hub keeps: commits, refs and pull requests of repositories, LFS objects."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MAIN = "main"


@dataclass(frozen=True)
class Blob:
    """Content of one file: where it lies on disk, its size, git id, and SHA-256 if it is large."""

    path: Path
    size: int
    oid: str
    sha256: str
    lfs: bool

    @classmethod
    def of(cls, path: Path, *, lfs: bool = False) -> Blob:
        size = path.stat().st_size
        git, sha = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
        with path.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                sha.update(chunk)
                git.update(chunk)
        if lfs:
            pointer = pointer_text(sha.hexdigest(), size)
            git = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer)
        return cls(path, size, git.hexdigest(), sha.hexdigest(), lfs)

    def read(self) -> bytes:
        return self.path.read_bytes()


def pointer_text(sha256: str, size: int) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: Mapping[str, Blob]
    message: str
    author: str


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    status: str = "draft"

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """One repository; `refs` holds branches, `refs/pr/N` and tags."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def history(self, revision: str = MAIN) -> list[Commit]:
        """Return the commits of a revision, newest first."""
        found, commit = [], self.find(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent) if commit.parent else None
        return found


class Store:
    """Repositories and objects, on disk under `root`; safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, Blob] = {}
        self.lock = threading.RLock()
        self._count = itertools.count()

    def new_file(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root / f"object-{next(self._count)}"

    def add_bytes(self, content: bytes) -> Blob:
        path = self.new_file()
        path.write_bytes(content)
        return Blob.of(path)

    def create(self, repo_id: str, *, private: bool, author: str = "somebody") -> Repo:
        """Make a repository with the one file the Hub puts into a new one."""
        repo = self.repos[repo_id] = Repo(private)
        attributes = self.add_bytes(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.commit(repo, MAIN, {".gitattributes": attributes}, "initial commit", author)
        return repo

    def commit(
        self,
        repo: Repo,
        revision: str,
        changes: Mapping[str, Blob | None],
        message: str,
        author: str = "somebody",
    ) -> Commit:
        """Put files (None removes one) on top of a revision."""
        parent = repo.find(revision)
        files = dict(parent.files) if parent else {}
        for name, blob in changes.items():
            if blob is None:
                files.pop(name, None)
            else:
                files[name] = blob
        text = f"{next(self._count)} {message} {sorted((n, b.oid) for n, b in files.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        commit = Commit(oid, parent.oid if parent else None, files, message, author)
        repo.commits[oid] = commit
        repo.refs[revision] = oid
        return commit

    def import_folder(self, folder: Path) -> Repo:
        """View a folder as a repository of one commit, `COMMIT`."""
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        files = {name: Blob.of(folder / name) for name in names}
        commit = Commit(COMMIT, None, files, "initial commit", "somebody")
        return Repo(False, {MAIN: COMMIT}, {COMMIT: commit})
