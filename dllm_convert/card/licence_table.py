"""Licences of base models, as data: what each asks of whoever publishes a model made from one.

Facts in our own words, each with a link to its source; no substitute for reading the licence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

AGREEMENT = "LICEN[SC]E*"
USE_POLICY = "USE_POLICY*"
NOTICE = "NOTICE*"


@dataclass(frozen=True)
class LicenceRules:
    """Conditions of one licence.

    Attributes:
        title: What the licence is called; empty if nothing is known of it.
        link: Where it can be read, None if only the base can tell.
        name_prefix: What the name of a derived model has to begin with.
        credit: Words that have to be displayed where the model is presented.
        notice: Sentence that a NOTICE file has to hold.
        files: Patterns of files that have to travel with the model.
        no_derivatives: Whether a changed model may not be distributed.
        conditions: What else to know, one plain sentence each.
        known: Whether this tool knows the licence; otherwise somebody has to read it.
    """

    title: str = ""
    link: str | None = None
    name_prefix: str | None = None
    credit: str | None = None
    notice: str | None = None
    files: tuple[str, ...] = ()
    no_derivatives: bool = False
    conditions: tuple[str, ...] = ()
    known: bool = True


_KEEP_NOTICES = "Copyright and licence notices of the base stay with every copy."
STATE_CHANGES = "Changed files have to say that they were changed; this card does."
NON_COMMERCIAL = "Commercial use is not allowed, of this model either."
_USE_POLICY_BINDS = "Its acceptable use policy binds everyone who uses this model."
_BINDS_RECIPIENTS = (
    "Its use restrictions bind everyone who receives this model and have to be passed on."
)
SHARE_ALIKE = "A changed model may only be shared under the same licence."
_ONLY_RESEARCH = "It is for research, not for commercial use."
_LLAMA_SCALE = (
    "Whoever served more than 700 million monthly users when that Llama was released needs a "
    "licence of their own from Meta."
)
_QWEN_SCALE = (
    "A product with more than 100 million monthly users needs a licence of its own from the vendor."
)


def _llama(spoken: str, page: str, *, improves_others: bool) -> LicenceRules:
    own_only = f"It may not be used to improve language models other than {spoken} and its kin."
    return LicenceRules(
        title=f"{spoken} Community License",
        link=f"https://www.llama.com/{page}/license/",
        name_prefix="Llama",
        credit="Built with Llama",
        notice=f"{spoken} is licensed under the {spoken} Community License, Copyright © Meta "
        "Platforms, Inc. All Rights Reserved.",
        files=(AGREEMENT, USE_POLICY, NOTICE),
        conditions=(_USE_POLICY_BINDS, _LLAMA_SCALE, *(() if improves_others else (own_only,))),
    )


# The second version asks neither for a name nor for a credit, and spells its own name in capitals.
_LLAMA_2 = replace(
    _llama("Llama 2", "llama2", improves_others=False),
    name_prefix=None,
    credit=None,
    notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta "
    "Platforms, Inc. All Rights Reserved.",
)


def _qwen(spoken: str, agreement: str, *, credit: str | None, extra: str) -> LicenceRules:
    return LicenceRules(
        title=f"{spoken} {agreement.lower()}",
        credit=credit,
        notice=f"{spoken} is licensed under the {spoken} {agreement}, Copyright (c) Alibaba Cloud. "
        "All Rights Reserved.",
        files=(AGREEMENT, NOTICE),
        conditions=(
            STATE_CHANGES,
            "Its versions differ: compare the NOTICE with what the LICENSE of the base asks for.",
            extra,
        ),
    )


_QWEN_OTHERS = "It may not be used to improve other language models."
TABLE: tuple[tuple[str, LicenceRules], ...] = (
    (r"llama-?2", _LLAMA_2),
    (r"(meta-)?llama-?3", _llama("Meta Llama 3", "llama3", improves_others=False)),
    (r"llama-?3[.-]1", _llama("Llama 3.1", "llama3_1", improves_others=True)),
    (r"llama-?3[.-]2", _llama("Llama 3.2", "llama3_2", improves_others=True)),
    (r"llama-?3[.-]3", _llama("Llama 3.3", "llama3_3", improves_others=True)),
    (r"llama-?4", _llama("Llama 4", "llama4", improves_others=True)),
    (
        r"gemma(-terms-of-use)?",
        LicenceRules(
            "Gemma Terms of Use",
            "https://ai.google.dev/gemma/terms",
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms",
            files=(NOTICE,),
            conditions=(
                "Whoever receives this model has to receive these terms as well.",
                _BINDS_RECIPIENTS,
                STATE_CHANGES,
            ),
        ),
    ),
    (
        r"qwen-research",
        _qwen(
            "Qwen",
            "RESEARCH LICENSE AGREEMENT",
            credit="Built with Qwen",
            extra=_ONLY_RESEARCH,
        ),
    ),
    (
        r"qwen",
        _qwen("Qwen", "LICENSE AGREEMENT", credit="Built with Qwen", extra=_QWEN_SCALE),
    ),
    (
        r"tongyi-qianwen-research",
        _qwen(
            "Tongyi Qianwen",
            "RESEARCH LICENSE AGREEMENT",
            credit=None,
            extra=f"{_ONLY_RESEARCH} {_QWEN_OTHERS}",
        ),
    ),
    (
        r"tongyi-qianwen",
        _qwen(
            "Tongyi Qianwen",
            "LICENSE AGREEMENT",
            credit=None,
            extra=f"{_QWEN_SCALE} {_QWEN_OTHERS}",
        ),
    ),
    (
        r"apache(-licen[sc]e)?-2\.0",
        LicenceRules(
            "Apache License 2.0",
            "https://www.apache.org/licenses/LICENSE-2.0",
            conditions=(
                _KEEP_NOTICES,
                "A NOTICE file of the base has to travel with the model.",
                STATE_CHANGES,
            ),
        ),
    ),
    (
        r"mit",
        LicenceRules("MIT", "https://opensource.org/license/mit", conditions=(_KEEP_NOTICES,)),
    ),
    (
        r"bsd(-[23]-clause.*)?",
        LicenceRules(
            "BSD", "https://opensource.org/license/bsd-3-clause", conditions=(_KEEP_NOTICES,)
        ),
    ),
    (
        r"(.*-)?openrail(-m|\+\+)?|bigscience-bloom-rail-1\.0",
        LicenceRules(
            "Open RAIL",
            "https://www.licenses.ai",
            files=(AGREEMENT,),
            conditions=(_BINDS_RECIPIENTS, STATE_CHANGES),
        ),
    ),
    (
        r"(a|l)?gpl(-.*)?",
        LicenceRules(
            "GNU General Public License family",
            "https://www.gnu.org/licenses/",
            files=(AGREEMENT,),
            conditions=(SHARE_ALIKE, _KEEP_NOTICES, STATE_CHANGES),
        ),
    ),
    (
        r"cc0-1\.0|unlicense|pddl|wtfpl",
        LicenceRules(
            "Public domain dedication", "https://creativecommons.org/publicdomain/zero/1.0/"
        ),
    ),
    (
        r"(fair-noncommercial|intel|h|apple)-(research|amlr)|deepfloyd-if",
        LicenceRules("Research licence", files=(AGREEMENT,), conditions=(_ONLY_RESEARCH,)),
    ),
)
"""Pattern of the licence's id or name, in small letters, to its rules; the first that fits."""

UNKNOWN = LicenceRules(known=False, conditions=("Its terms were not looked at by this tool.",))
"""Of a licence that this tool has no entry for, or of a base that states none."""
