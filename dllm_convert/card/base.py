"""What a card may say of the base model and of the text, without paths of anybody's machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from dllm_convert.card.licences import LicenceRules, rules_for
from dllm_convert.card.text import address
from dllm_convert.common.hub_names import (
    COMMIT,
    LICENCE_FILE_NAMES,
    LICENCES,
    is_model_id,
    language_codes,
)
from dllm_convert.common.redaction import last_part
from dllm_convert.source.folder import LICENCE_FILES
from dllm_convert.training.data.formats import FILE_SUFFIXES

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Licence:
    """Under what terms the base was given.

    Attributes:
        id: As the Hub knows it, `other` if it does not, None if nothing is recorded.
        name: Name of a licence without an id.
        link: Where it can be read: an https address, or LICENSE in this repository.
        rules: What it asks for.
        files: Names of licence files in the folder.
    """

    id: str | None
    name: str | None
    link: str | None
    rules: LicenceRules
    files: tuple[str, ...]


@dataclass(frozen=True)
class Base:
    """What was converted.

    Attributes:
        name: Short name for titles.
        repo_id: Hub id it was read from, None if it did not come from the Hub.
        origin: Hub id that a GGUF file names as what it holds, None if it names none.
        revision: Commit of the Hub repository.
        file: Name of the GGUF file or of the folder, where it is not from the Hub.
        sha256: SHA-256 of a GGUF file.
        licence: Its terms.
        languages: Codes the Hub knows, empty if unknown.
    """

    name: str
    repo_id: str | None
    origin: str | None
    revision: str | None
    file: str | None
    sha256: str | None
    licence: Licence
    languages: tuple[str, ...]

    @property
    def hub_id(self) -> str | None:
        """The base on the Hub, read or named by the file."""
        return self.repo_id or self.origin


@dataclass(frozen=True)
class Text:
    """A body of text.

    Attributes:
        kind: pydoc, files or hub; or mixture.
        names: File names or the dataset id; never a path of the machine it was made on.
        revision: Commit of a Hub dataset, None if unknown.
        subset: Subset of a Hub dataset, None for its only one.
        split: Split of a Hub dataset; of another text a slice of its rows.
        containing: What its documents had to contain, None for nothing.
        mixed: The texts of a mixture, each with its share of the sequences.
    """

    kind: Literal["pydoc", "files", "hub", "mixture"]
    names: tuple[str, ...]
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    containing: str | None = None
    mixed: tuple[tuple[float, Text], ...] = ()

    @property
    def dataset_ids(self) -> tuple[str, ...]:
        """Ids of the datasets on the Hub that it is of."""
        own = self.names if self.kind == "hub" else ()
        return (*own, *(name for _, text in self.mixed for name in text.dataset_ids))


@dataclass(frozen=True)
class Data:
    """Training and held-out text.

    Attributes:
        text: What was trained on.
        held_out: What was measured on, if that was another text or split; else whole documents of
            `text` were held out.
        chats: Documents that were chats.
        facts: Counts.
    """

    text: Text
    held_out: Text | None
    chats: int
    facts: Mapping[str, Any]

    @property
    def measured(self) -> Text:
        """The text that measures were taken on."""
        return self.held_out or self.text


def base_of(folder: Path, manifest: Mapping[str, Any]) -> Base:
    """Read what was converted.

    Args:
        folder: The checkpoint, for its licence files.
        manifest: Content of its dllm_convert.json.
    """
    source = manifest["source"]
    given, repo_id, origin = str(source["given"]), source.get("repo_id"), source.get("origin")
    repo_id = repo_id if is_model_id(repo_id) else None
    file = last_part(given)
    revision = source.get("revision")
    languages = source.get("language") or ()
    return Base(
        name=last_part(repo_id) if repo_id else file.removesuffix(".gguf") or "model",
        repo_id=repo_id,
        origin=origin if is_model_id(origin) else None,
        revision=revision if repo_id and COMMIT.fullmatch(str(revision)) else None,
        file=None if repo_id else file,
        sha256=_sha256(source) if source.get("kind") == "gguf" else None,
        licence=_licence(folder, source, repo_id),
        languages=language_codes((languages,) if isinstance(languages, str) else tuple(languages)),
    )


def _sha256(source: Mapping[str, Any]) -> str | None:
    """Return the digest of the one file that was read, None if it is not recorded."""
    digests = [str(digest) for digest in (source.get("files") or {}).values()]
    return digests[0] if len(digests) == 1 and _SHA256.fullmatch(digests[0]) else None


def _licence(folder: Path, source: Mapping[str, Any], repo_id: str | None) -> Licence:
    stated, name = source.get("license"), source.get("license_name")
    rules = rules_for(stated, name)
    files = tuple(sorted({p.name for pattern in LICENCE_FILES for p in folder.glob(pattern)}))
    if stated in LICENCES and stated != "other":
        return Licence(stated, None, rules.link, rules, files)
    if stated is None and name is None:
        return Licence(None, None, None, rules, files)
    # The Hub wants a name beside `other`; the base may have given an id that the Hub has not.
    name = name or (stated if stated != "other" else None) or "see-the-base-model"
    return Licence("other", name, _link(source, repo_id, files) or rules.link, rules, files)


def _link(source: Mapping[str, Any], repo_id: str | None, files: tuple[str, ...]) -> str | None:
    """Return where a licence without an id can be read; a file beside the card comes first."""
    here = next((name for name in LICENCE_FILE_NAMES if name in files), None)
    if here is not None:
        return here
    link = source.get("license_link")
    if link is None or link.startswith("https://"):
        return address(link) if link else None
    if repo_id is None or ".." in link or not re.fullmatch(r"[\w./-]+", link):
        return None
    revision = source.get("revision") or "main"
    return f"https://huggingface.co/{repo_id}/blob/{revision}/{link.removeprefix('./')}"


def data_of(facts: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> Data | None:
    """Read what text was used; None if there was none.

    Args:
        facts: Section `measurements.data` of the manifest.
        recipe: The resolved recipe.
    """
    if not facts:
        return None
    asked = recipe.get("data") or {}
    held_out = facts.get("held_out")
    if not held_out and (asked.get("held_out_source") or asked.get("held_out_split")):
        held_out = {
            "source": asked.get("held_out_source") or facts["source"],
            "split": asked.get("held_out_split"),
        }
    return Data(
        _text({name: asked.get(name) for name in ("subset", "split", "containing")} | {**facts}),
        _text(held_out) if held_out else None,
        int(facts.get("chats") or 0),
        facts,
    )


def _text(facts: Mapping[str, Any]) -> Text:
    if facts.get("kind") == "mixture":
        mixed = tuple((float(text["share"]), _text(text)) for text in facts["texts"])
        return Text("mixture", tuple(name for _, text in mixed for name in text.names), mixed=mixed)
    source = str(facts["source"])
    kind = data_kind(source, facts.get("kind"))
    containing = facts.get("containing")
    if kind != "hub":
        part = str(facts.get("split"))
        return Text(
            kind,
            data_names(source, kind),
            split=part if "[" in part else None,
            containing=containing,
        )
    revision, subset, split = (
        str(facts[name]) if facts.get(name) else None for name in ("revision", "subset", "split")
    )
    return Text(kind, data_names(source, kind), revision, subset, split, containing)


def data_kind(source: str, recorded: str | None = None) -> Literal["pydoc", "files", "hub"]:
    """Return what a `data.source` stands for; older manifests do not record it."""
    if source == "pydoc":
        return "pydoc"
    if recorded in ("files", "hub"):
        return "hub" if recorded == "hub" and is_model_id(source) else "files"
    looks_like_id = is_model_id(source) and PurePath(source).suffix.lower() not in FILE_SUFFIXES
    return "hub" if looks_like_id and not Path(source).exists() else "files"


def data_names(source: str, kind: str) -> tuple[str, ...]:
    """Return the dataset's id, or the names of files without their folders."""
    if kind != "files":
        return (source,)
    return tuple(last_part(part) for part in source.split(",") if part.strip())
