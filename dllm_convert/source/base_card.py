"""What a base model says of itself that a model made from it has to pass on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from dllm_convert.common.foreign_files import MIB
from dllm_convert.common.hub_names import is_model_id
from dllm_convert.recipe.yaml_text import check_structure

_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_HUB_HOSTS = ("huggingface.co", "hf.co")


@dataclass(frozen=True)
class BaseCard:
    """Licence, languages and origin of a base, as its author states them.

    Attributes:
        license: Licence id; None if there is none, or more than one.
        license_name: Name of a licence that has no id of its own (`license: other`).
        license_link: Where that licence can be read: an address, or a file of the base.
        languages: Language codes, as written.
        origin: Hub id that a GGUF file names as the model it holds; nobody checked it.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    origin: str | None = None


def base_card(metadata: Mapping[str, Any]) -> BaseCard:
    """Read the metadata of a model card; what is not of the usual type counts as not said."""
    return BaseCard(
        license=_single(metadata.get("license")),
        license_name=_single(metadata.get("license_name")),
        license_link=_single(metadata.get("license_link")),
        languages=_texts(metadata.get("language")),
    )


def read_base_card(readme: Path) -> BaseCard:
    """Read the front matter of a README.md; empty where there is none, or it is not YAML."""
    if not readme.is_file():
        return BaseCard()
    try:
        with readme.open("rb") as file:
            text = file.read(MIB).decode("utf-8", errors="replace")
        front = _FRONT.match(text.lstrip("\ufeff"))
        if front is None:
            return BaseCard()
        check_structure(front[1])
        # Every value stays a text: in YAML 1.1 the language `no` would be the value false.
        content = yaml.load(front[1], Loader=yaml.BaseLoader)  # noqa: S506
    except (OSError, yaml.YAMLError):
        return BaseCard()
    return base_card(content) if isinstance(content, dict) else BaseCard()


def gguf_base_card(metadata: Mapping[str, Any]) -> BaseCard:
    """Read the `general.*` keys of a GGUF file.

    `general.base_model.*` names the ancestors of the model, not the model itself, so it is no
    origin; `general.source.*` is the repository that was converted to the file.
    """
    origin = _single(metadata.get("general.source.huggingface.repository"))
    addresses = (metadata.get(f"general.source.{key}") for key in ("repo_url", "url"))
    found = (_hub_id(str(address)) for address in addresses if isinstance(address, str))
    return BaseCard(
        license=_single(metadata.get("general.license")),
        license_name=_single(metadata.get("general.license.name")),
        license_link=_single(metadata.get("general.license.link")),
        languages=_texts(metadata.get("general.languages")),
        origin=origin if is_model_id(origin, owned=True) else next(filter(None, found), None),
    )


def _hub_id(address: str) -> str | None:
    parts = urlsplit(address)
    repo_id = parts.path.strip("/")
    on_hub = parts.scheme == "https" and parts.hostname in _HUB_HOSTS
    return repo_id if on_hub and is_model_id(repo_id, owned=True) else None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(v.strip() for v in values if isinstance(v, str) and v.strip())


def _single(value: Any) -> str | None:
    texts = _texts(value)
    return texts[0] if len(texts) == 1 else None
