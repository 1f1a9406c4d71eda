"""What licences of base models ask of whoever publishes a model made from one.

Facts in our own words, each with its source; no substitute for reading the licence.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch

from dllm_convert.errors import IncompatibleError

_LLAMA = "https://www.llama.com"


@dataclass(frozen=True)
class LicenceRules:
    """Conditions of one licence.

    Attributes:
        pattern: Licence ids it applies to, as a shell pattern.
        link: Where the licence can be read.
        name_prefix: What the name of a derived model has to begin with.
        notice: Words the card has to show.
        files: Patterns of files that have to travel with the model.
        no_derivatives: Whether a changed model may not be distributed.
        conditions: What else to know, in plain words.
    """

    pattern: str
    link: str | None = None
    name_prefix: str | None = None
    notice: str | None = None
    files: tuple[str, ...] = ()
    no_derivatives: bool = False
    conditions: tuple[str, ...] = ()


_USE_POLICY = "Its acceptable use policy binds everyone who uses this model."
_KEEP_NOTICES = "Copyright notices of the base stay with the files, and changes are to be stated."

RULES = (
    LicenceRules(
        "llama2",
        f"{_LLAMA}/llama-downloads",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta "
        "Platforms, Inc. All Rights Reserved.",
        files=("LICENSE*", "USE_POLICY*"),
        conditions=(
            _USE_POLICY,
            "It may not be used to improve large language models other than Llama 2 and its "
            "derivatives.",
        ),
    ),
    *(
        LicenceRules(
            identifier,
            f"{_LLAMA}/{page}/license/",
            name_prefix="Llama",
            notice="Built with Llama. "
            f"{spoken} is licensed under the {spoken} Community License, Copyright © Meta "
            "Platforms, Inc. All Rights Reserved.",
            files=("LICENSE*", "USE_POLICY*"),
            conditions=(_USE_POLICY,),
        )
        for identifier, page, spoken in (
            ("llama3", "llama3", "Meta Llama 3"),
            ("llama3.1", "llama3_1", "Llama 3.1"),
            ("llama3.2", "llama3_2", "Llama 3.2"),
            ("llama3.3", "llama3_3", "Llama 3.3"),
            ("llama4", "llama4", "Llama 4"),
        )
    ),
    LicenceRules(
        "gemma",
        "https://ai.google.dev/gemma/terms",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms.",
        conditions=(
            "Its terms and use restrictions pass on to everyone who receives this model.",
            "The weights were modified by this conversion.",
        ),
    ),
    *(
        LicenceRules(
            pattern,
            notice="Built with Qwen.",
            files=("LICENSE*",),
            conditions=("Qwen's own licences limit the number of users or forbid commercial use.",),
        )
        for pattern in ("qwen*", "tongyi*")
    ),
    LicenceRules(
        "*-nd*", no_derivatives=True, conditions=("Changed versions may not be distributed.",)
    ),
    LicenceRules(
        "*-nc*",
        conditions=("Commercial use is not allowed, of this model either.",),
    ),
    LicenceRules(
        "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", conditions=(_KEEP_NOTICES,)
    ),
    LicenceRules("mit", "https://opensource.org/license/mit", conditions=(_KEEP_NOTICES,)),
    LicenceRules("bsd*", conditions=(_KEEP_NOTICES,)),
)
"""The first pattern that fits counts."""

UNKNOWN = LicenceRules("*", conditions=("Its terms were not looked at by this tool.",))


def rules_for(licence: str | None, name: str | None = None) -> LicenceRules | None:
    """Return what a licence asks for, None if the licence is not known at all.

    Args:
        licence: Licence id of the base's card.
        name: Its `license_name`, which counts where the id is `other`.
    """
    identifier = name if licence in (None, "other") and name else licence
    if identifier is None:
        return None
    # Gives -nd and -nc a hyphen after them too, as in cc-by-nd-4.0 and a bare cc-by-nd.
    text = f"{identifier.strip().lower()}-"
    fits = (rule for rule in RULES if fnmatch(text, f"{rule.pattern.rstrip('-')}-"))
    return next(fits, UNKNOWN)


def conforming_name(rules: LicenceRules, repo_id: str) -> str | None:
    """Return a repository id the licence allows, None if `repo_id` is one."""
    namespace, slash, name = repo_id.rpartition("/")
    prefix = rules.name_prefix
    if prefix is None or name.lower().startswith(prefix.lower()):
        return None
    rest = re.sub(rf"(?i)^(meta-)?{prefix}[-_.]*|[-_.]?{prefix}(?=[-_.]|$)", "", name)
    return f"{namespace}{slash}{prefix}-{rest.lstrip('-_.') or 'dllm'}"


def check_publication(
    rules: LicenceRules | None, repo_id: str, *, public: bool, files: Collection[str]
) -> tuple[str, ...]:
    """Check what a licence asks of the one who publishes.

    Args:
        rules: Of the base's licence, None if it is unknown.
        repo_id: Where the model is to be published.
        public: Whether everybody will see it.
        files: Names of the files that will be published; empty if they are not known yet.

    Returns:
        Warnings.

    Raises:
        IncompatibleError: The licence forbids it as asked.
    """
    if rules is None:
        return ("the licence of the base is not known: find it out before you share the model",)
    if rules.no_derivatives and public:
        raise IncompatibleError(
            f"the licence of the base ({rules.pattern.strip('*-')}) forbids to distribute "
            "changed versions",
            hint="Leave --public out: a private repository is not distribution",
        )
    wanted = conforming_name(rules, repo_id)
    if wanted is not None:
        raise IncompatibleError(
            f"the licence of the base ({rules.pattern}) wants the name of a derived model to begin "
            f"with {rules.name_prefix!r}, found {repo_id}",
            hint=f"Push to {wanted}",
        )
    warnings = []
    if rules.no_derivatives:
        warnings.append("the licence of the base forbids to distribute this model: keep it private")
    for pattern in rules.files if files else ():
        if not any(fnmatch(name, pattern) for name in files):
            warnings.append(
                f"the licence of the base ({rules.pattern}) wants a copy of {pattern.rstrip('*')} "
                "to travel with the model, and the base had none: lay it into the folder"
            )
    return tuple(warnings)
