"""Words that the Hub gives a meaning to in a card's metadata, and shapes of its ids."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = r"(?=.{1,96}(?:/|$))\w(?:[\w.-]*\w)?"
REPO_ID = re.compile(rf"{_NAME}(?:/{_NAME})?", re.ASCII)
"""A model or dataset: `owner/name`, or `name` for those from before owners."""

_MEANT = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What somebody may have meant as one of these, typing errors included: the Hub says the rest."""
_PATH_STARTS = ("/", "./", "../", "~", ".\\", "..\\")

LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
"""ISO 639-1, -2 or -3 in small letters, or one of two words of the Hub's own."""

COMMIT = re.compile(r"[0-9a-f]{40}")

LICENCES = frozenset(
    (
        *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
        *("bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0"),
        *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0"),
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
        *("cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
        *("cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0"),
        *("epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl"),
        *("gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research"),
        *("intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by"),
        *("odbl", "open-mdw", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1"),
        *("ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license"),
        *("fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2"),
        *("llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other"),
    )
)
"""Licence ids (https://huggingface.co/docs/hub/repositories-licenses, read in November 2026)."""

METADATA_KEYS = (
    *("language", "license", "license_name", "license_link", "library_name", "pipeline_tag"),
    *("tags", "metrics", "datasets", "base_model", "base_model_relation", "new_version"),
    *("model-index", "widget", "inference", "co2_eq_emissions", "thumbnail"),
    *("extra_gated_heading", "extra_gated_description", "extra_gated_prompt"),
    *("extra_gated_button_content", "extra_gated_fields"),
)
"""Keys that the Hub reads (hub-docs, modelcard.md and model-cards.md)."""

LICENCE_FILE_NAMES = ("LICENSE", "LICENSE.md")
"""Files of the repository that `license_link` may name; anything else has to be an address."""


def is_model_id(text: object, *, owned: bool = False) -> bool:
    """Whether a value has the shape of a repository id; nobody asks the Hub whether it exists.

    Args:
        text: Any value.
        owned: Whether it has to name its owner.
    """
    return (
        isinstance(text, str)
        and REPO_ID.fullmatch(text) is not None
        and ("/" in text or not owned)
        and ".." not in text
        and "--" not in text
        and not text.endswith(".git")
    )


def is_hub_id(source: str) -> bool:
    """Whether a source is an id of the Hub, as in owner/name: what exists here is meant itself."""
    looks_local = source.startswith(_PATH_STARTS) or source.endswith(".gguf")
    if looks_local or os.sep * 2 in source or not _MEANT.fullmatch(source):
        return False
    return not Path(source).expanduser().exists()


def language_codes(stated: tuple[str, ...]) -> tuple[str, ...]:
    """Return the languages the Hub would take, in order; regions such as `-US` are left out."""
    codes = (language.strip().lower().partition("-")[0] for language in stated)
    return tuple(dict.fromkeys(code for code in codes if LANGUAGE.fullmatch(code)))
