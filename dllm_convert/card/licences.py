"""What the licence of a base asks of whoever publishes a model made from it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dllm_convert.card.licence_table import (
    AGREEMENT,
    NON_COMMERCIAL,
    NOTICE,
    SHARE_ALIKE,
    STATE_CHANGES,
    TABLE,
    UNKNOWN,
    USE_POLICY,
    LicenceRules,
)
from dllm_convert.common.redaction import last_part
from dllm_convert.errors import IncompatibleError

__all__ = [
    "NOTICE_FILE",
    "UNKNOWN",
    "LicenceRules",
    "check_publication",
    "conforming_name",
    "missing_files",
    "notice_text",
    "rules_for",
    "write_notice",
]

NOTICE_FILE = "NOTICE"
_SPOKEN_FILES = {
    AGREEMENT: "the licence (LICENSE)",
    USE_POLICY: "the acceptable use policy (USE_POLICY.md)",
    NOTICE: "the attribution notice (NOTICE)",
}


def rules_for(licence: str | None, name: str | None = None) -> LicenceRules:
    """Return what a licence asks for; `UNKNOWN` where that is not known.

    Args:
        licence: Licence id of the base's card.
        name: Its `license_name`, which counts where the id is missing or `other`.
    """
    identifier = name if name and licence in (None, "other", "unknown") else licence
    text = re.sub(r"[\s_]+", "-", (identifier or "").strip().lower())
    text = re.sub(r"(-community)?(-licen[sc]e)?(-agreement)?$", "", text) or text
    if text.startswith("cc-by"):
        return _creative_commons(text)
    return next((rules for pattern, rules in TABLE if re.fullmatch(pattern, text)), UNKNOWN)


def _creative_commons(identifier: str) -> LicenceRules:
    """Read the elements off a Creative Commons id, such as cc-by-nc-nd-4.0."""
    elements, _, version = identifier.removeprefix("cc-").rpartition("-")
    if not re.fullmatch(r"\d\.\d", version):
        elements, version = identifier.removeprefix("cc-"), ""
    parts = elements.split("-")
    conditions = ["The authors of the base have to be named, with a link to the licence."]
    conditions += [STATE_CHANGES] if "nd" not in parts else ["No changed model may be distributed."]
    conditions += [NON_COMMERCIAL] if "nc" in parts else []
    conditions += [SHARE_ALIKE] if "sa" in parts else []
    return LicenceRules(
        f"Creative Commons {elements.upper()}{f' {version}' if version else ''}",
        f"https://creativecommons.org/licenses/{elements}/{version or '4.0'}/",
        no_derivatives="nd" in parts,
        conditions=tuple(conditions),
    )


def conforming_name(rules: LicenceRules, repo_id: str) -> str | None:
    """Return a repository id the licence allows, None if `repo_id` is one."""
    namespace, slash, name = repo_id.rpartition("/")
    prefix = rules.name_prefix
    if prefix is None or name.startswith(prefix):
        return None
    inside = re.search(rf"(?i)(?:^|[-_.])(?:meta-)?{prefix}(?=\d|[-_.]|$)", name)
    rest = name[: inside.start()] + name[inside.end() :] if inside else name
    glue = "" if rest[:1].isdigit() and inside and inside.start() == 0 else "-"
    return f"{namespace}{slash}{prefix}{glue}{rest.lstrip('-_.') or 'dllm'}"


def missing_files(rules: LicenceRules, files: Collection[str]) -> tuple[str, ...]:
    """Return in words what the licence wants beside the weights and `files` does not have."""
    names = [name.upper() for name in files]
    return tuple(
        _SPOKEN_FILES[pattern]
        for pattern in rules.files
        if not any(fnmatchcase(name, pattern) for name in names)
    )


def notice_text(rules: LicenceRules, model: str) -> str | None:
    """Return the content of a NOTICE file, None if the licence asks for none.

    Args:
        rules: The licence of the base.
        model: Short name of the base.
    """
    if rules.notice is None:
        return None
    credit = f"{rules.credit}.\n\n" if rules.credit else ""
    return (
        f"{rules.notice}\n\n{credit}"
        f"The files here are not the original ones: {model} was converted to a diffusion language "
        "model with dllm-convert.\n"
    )


def write_notice(folder: Path, source: Mapping[str, Any]) -> None:
    """Write the attribution that the base's licence asks for, if the base came without one.

    Args:
        folder: A checkpoint that is being put together.
        source: The `source` section of its manifest.
    """
    base = last_part(str(source["repo_id"] or source["given"]))
    text = notice_text(rules_for(source["license"], source["license_name"]), base)
    if text is not None and not any(
        path.name.upper().startswith("NOTICE") for path in folder.iterdir()
    ):
        (folder / NOTICE_FILE).write_text(text, encoding="utf-8")


def check_publication(
    rules: LicenceRules, repo_id: str, *, public: bool, files: Collection[str]
) -> tuple[str, ...]:
    """Check what a licence asks of the one who publishes.

    Args:
        rules: Of the base's licence.
        repo_id: Where the model is to be published.
        public: Whether everybody will see it.
        files: Names of the files that will be published; empty if they are not known yet.

    Returns:
        Warnings, each a sentence without a full stop.

    Raises:
        IncompatibleError: The licence forbids it as asked; the hint names what it would allow.
    """
    if not rules.known:
        return (
            "what the licence of the base asks for is not known: read it before you share this",
        )
    if rules.no_derivatives and public:
        raise IncompatibleError(
            f"the licence of the base ({rules.title}) forbids to distribute changed versions",
            hint="Leave --public out: a private repository is not distribution",
        )
    wanted = conforming_name(rules, repo_id)
    if wanted is not None:
        raise IncompatibleError(
            f"the licence of the base ({rules.title}) wants the name of a derived model to begin "
            f"with {rules.name_prefix!r}, found {repo_id!r}",
            hint=f"Push to {wanted}",
        )
    warnings = []
    if rules.no_derivatives:
        warnings.append("the licence of the base forbids to distribute this model: keep it private")
    if files:
        warnings += [
            f"the licence of the base ({rules.title}) wants {what} to travel with the model, and "
            "the folder has none: lay it beside the weights"
            for what in missing_files(rules, files)
        ]
    return tuple(warnings)
