"""The last look at what is about to be published: no credential and no home folder in any text."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from dllm_convert.common.foreign_files import MAX_TEXT_BYTES
from dllm_convert.common.manifest import file_names, read_manifest
from dllm_convert.common.secrets_found import Finding, find_homes, find_secrets
from dllm_convert.errors import DataError

_UNREAD = ("*.safetensors", "*.png", "*.gif", "tokenizer.json", "vocab.*", "merges.txt", "*.model")
"""Weights, pictures and vocabularies, whose millions of pieces spell anything."""
_OF_THE_BASE = (
    *("chat_template*", "additional_chat_templates/*", "tokenizer_config.json", "*.py"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*"),
)
"""Texts of others: what a template says of a folder is no folder of this machine."""


def check_staged(folder: Path) -> None:
    """Refuse to publish a folder in which something is that was not meant for others.

    Args:
        folder: Exactly the files that go up.

    Raises:
        DataError: A text holds a credential or a home folder; file and line are named.
    """
    found = list(_findings(folder))
    if not found:
        return
    name, first = found[0]
    more = f", and {len(found) - 1} more such places" if len(found) > 1 else ""
    raise DataError(
        f"{name}, line {first.line}: {first.what} stands there{more}: nothing was published",
        hint="Take it out, and convert again if a recipe brought it there; a token that others may "
        "have seen has to be revoked",
    )


def _findings(folder: Path) -> Iterator[tuple[str, Finding]]:
    sample = read_manifest(folder).get("sample")
    written = "".join(map(str, sample.values())) if isinstance(sample, dict) else ""
    for name in file_names(folder):
        if _matches(name, _UNREAD) or (folder / name).stat().st_size > MAX_TEXT_BYTES:
            continue
        text = (folder / name).read_bytes().decode("utf-8", errors="replace")
        yield from ((name, finding) for finding in find_secrets(text))
        if not _matches(name, _OF_THE_BASE):
            # A model may write of folders that no machine has.
            homes = (finding for finding in find_homes(text) if finding.found not in written)
            yield from ((name, finding) for finding in homes)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
