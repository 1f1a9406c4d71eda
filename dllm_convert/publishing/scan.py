"""The last look at what is about to be published: no credential and no home folder in any text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dllm_convert.common.manifest import MANIFEST_FILE, checkpoint_files, read_manifest
from dllm_convert.common.secrets_found import Finding, find_homes, find_secrets, unescaped
from dllm_convert.errors import DataError

PIECE = 1 << 22
"""Characters of a text that are looked at together, whatever its length."""
OVERLAP = 1 << 12
"""Characters that two pieces share: longer than any credential."""
_UNREAD = (
    "*.safetensors",
    "*.gguf",
    "*.png",
    "*.gif",
    "tokenizer.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
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
    has_sample = (folder / MANIFEST_FILE).is_file()
    sample = read_manifest(folder).get("sample") if has_sample else None
    written = "".join(_texts(sample))
    for name in checkpoint_files(folder):
        if _matches(name, _UNREAD):
            continue
        ours = not _matches(name, _OF_THE_BASE)
        seen: set[tuple[str, int]] = set()
        for lines, text in _pieces(folder / name):
            for finding in _in_text(text, written, homes=ours):
                place = finding.what, lines + finding.line
                # Pieces overlap, and what needs no unescaping is found twice.
                if place not in seen:
                    seen.add(place)
                    yield name, replace(finding, line=place[1])


def _texts(value: Any) -> Iterator[str]:
    """Yield every text of a section of the manifest, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _in_text(text: str, written: str, *, homes: bool) -> Iterator[Finding]:
    """Yield what a text holds as it stands there, and as its reader would take it."""
    meant = unescaped(text)
    for one in (text, meant) if meant != text else (text,):
        yield from find_secrets(one)
        if homes:
            # A model may write of folders that no machine has.
            yield from (finding for finding in find_homes(one) if finding.found not in written)


def _pieces(path: Path) -> Iterator[tuple[int, str]]:
    """Yield a text in pieces that overlap, and how many lines stand before each."""
    lines, kept = 0, ""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        while True:
            piece = file.read(PIECE)
            text = kept + piece
            yield lines, text
            if len(piece) < PIECE:
                return
            kept = text[-OVERLAP:]
            lines += text.count("\n", 0, len(text) - len(kept))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
