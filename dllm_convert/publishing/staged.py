"""A folder ready to go up, with what is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dllm_convert.common.manifest import CARD_FILE, MANIFEST_FILE, read_manifest
from dllm_convert.publishing.remote import RemoteState


@dataclass
class Staged:
    """What is to be published.

    Attributes:
        folder: Exactly the files that go up.
        merged: The checkpoint they were taken from.
        title: Name of the model, for the commit message.
        description: Body of the commit message.
        verified: Whether its verification ran and passed.
        card_kept: Whether the repository's own README.md took the place of ours.
    """

    folder: Path
    merged: Path
    title: str
    description: str
    verified: bool
    card_kept: bool = False
    record_file: ClassVar[str] = MANIFEST_FILE
    """Where it says what it holds."""

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of its dllm_convert.json."""
        return read_manifest(self.folder)

    def takes_the_place(self, remote: RemoteState, revision: str) -> bool:
        """Whether what a branch holds is of ours too, and gives way.

        Args:
            remote: The repository at the branch's commit.
            revision: The branch.
        """
        return False

    def keep_card(self, content: bytes) -> None:
        """Put the repository's own README.md in the place of ours, so that it stays as it is."""
        path = self.folder / CARD_FILE
        # A hard link to the checkpoint's card: writing through it would change that file.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        self.card_kept = True
