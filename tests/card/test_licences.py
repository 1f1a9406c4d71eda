"""Licence rules: found under every spelling, strict where they are strict."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from dllm_convert.card.licence_table import TABLE, LicenceRules
from dllm_convert.card.licences import (
    UNKNOWN,
    check_publication,
    conforming_name,
    missing_files,
    notice_text,
    rules_for,
    write_notice,
)
from dllm_convert.errors import IncompatibleError

WHOLE = ("model.safetensors", "LICENSE.txt", "USE_POLICY.md", "NOTICE")
LLAMAS = ("llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")


@pytest.mark.parametrize(
    ("licence", "name", "title"),
    [
        ("llama2", None, "Llama 2 Community License"),
        ("llama3", None, "Meta Llama 3 Community License"),
        ("llama3.2", None, "Llama 3.2 Community License"),
        ("other", "llama-3.2-community-license", "Llama 3.2 Community License"),
        ("other", "Llama3_2", "Llama 3.2 Community License"),
        (None, "llama-3.1-community-license-agreement", "Llama 3.1 Community License"),
        ("other", "llama-3.3", "Llama 3.3 Community License"),
        ("llama4", None, "Llama 4 Community License"),
        ("gemma", None, "Gemma Terms of Use"),
        ("other", "gemma-terms-of-use", "Gemma Terms of Use"),
        ("other", "qwen-research", "Qwen research license agreement"),
        ("other", "qwen", "Qwen license agreement"),
        ("other", "tongyi-qianwen", "Tongyi Qianwen license agreement"),
        ("other", "tongyi-qianwen-research-license", "Tongyi Qianwen research license agreement"),
        ("apache-2.0", None, "Apache License 2.0"),
        ("Apache 2.0", None, "Apache License 2.0"),
        ("apache-2.0", "llama3", "Apache License 2.0"),
        ("mit", None, "MIT"),
        ("mit license", None, "MIT"),
        ("bsd-3-clause", None, "BSD"),
        ("cc-by-4.0", None, "Creative Commons BY 4.0"),
        ("cc-by-nc-nd-3.0", None, "Creative Commons BY-NC-ND 3.0"),
        ("cc-by-nc-sa", None, "Creative Commons BY-NC-SA"),
        ("bigscience-openrail-m", None, "Open RAIL"),
        ("openrail++", None, "Open RAIL"),
        ("agpl-3.0", None, "GNU General Public License family"),
    ],
)
def test_a_licence_is_found(licence: str | None, name: str | None, title: str) -> None:
    rules = rules_for(licence, name)
    assert rules.title == title
    assert rules.known


@pytest.mark.parametrize(
    ("licence", "name"),
    [
        (None, None),
        ("other", None),
        ("unknown", None),
        ("", ""),
        ("other", "my-own-terms"),
        ("llama5", None),
        ("not-mit", None),
        ("mitigated", None),
        ("gemma-like", None),
        ("cc", None),
    ],
)
def test_what_is_not_known_is_said_to_be_unknown(licence: str | None, name: str | None) -> None:
    rules = rules_for(licence, name)
    assert rules is UNKNOWN
    assert check_publication(rules, "me/x", public=False, files=WHOLE)
    assert "read it" in check_publication(rules, "me/x", public=True, files=WHOLE)[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("me/SmolThing-bd3lm-32", "me/Llama-SmolThing-bd3lm-32"),
        ("me/Meta-Llama-3-8B-mdlm", "me/Llama-3-8B-mdlm"),
        ("me/llama-3.2-1b-mdlm", "me/Llama-3.2-1b-mdlm"),
        ("me/Hermes-3-Llama-3.1-8B-mdlm", "me/Llama-Hermes-3-3.1-8B-mdlm"),
        ("me/TinyLlama-mdlm", "me/Llama-TinyLlama-mdlm"),
        ("me/llama3-mdlm", "me/Llama3-mdlm"),
        ("me/LLAMA", "me/Llama-dllm"),
        ("mine", "Llama-mine"),
        ("me/Llama-3.2-1B-bd3lm-32", None),
        ("me/Llama3", None),
    ],
)
def test_a_derived_llama_is_called_llama(given: str, wanted: str | None) -> None:
    for licence in LLAMAS:
        rules = rules_for(licence)
        assert conforming_name(rules, given) == wanted
        if wanted is None:
            assert check_publication(rules, given, public=True, files=WHOLE) == ()
        else:
            assert conforming_name(rules, wanted) is None
            for public in (True, False):
                with pytest.raises(IncompatibleError, match=re.escape(f"Push to {wanted}")) as info:
                    check_publication(rules, given, public=public, files=WHOLE)
            assert info.value.exit_code == 3


@pytest.mark.parametrize("licence", ["llama2", "gemma", "apache-2.0", "mit", "cc-by-nc-4.0"])
def test_other_licences_leave_the_name_free(licence: str) -> None:
    assert conforming_name(rules_for(licence), "me/anything") is None
    assert check_publication(rules_for(licence), "me/anything", public=True, files=WHOLE) == ()


def test_no_derivatives_stays_private() -> None:
    for licence in ("cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-nd-3.0"):
        rules = rules_for(licence)
        with pytest.raises(IncompatibleError, match="--public"):
            check_publication(rules, "me/x", public=True, files=WHOLE)
        (warning,) = check_publication(rules, "me/x", public=False, files=WHOLE)
        assert "keep it private" in warning


def test_creative_commons_elements() -> None:
    text = " ".join(rules_for("cc-by-nc-sa-4.0").conditions)
    assert "Commercial use is not allowed" in text
    assert "same licence" in text
    assert not rules_for("cc-by-nc-sa-4.0").no_derivatives
    assert rules_for("cc-by-sa-3.0").link == "https://creativecommons.org/licenses/by-sa/3.0/"
    assert "Commercial" not in " ".join(rules_for("cc-by-4.0").conditions)


def test_missing_files_are_named() -> None:
    rules = rules_for("llama3.2")
    warnings = check_publication(rules, "me/Llama-x", public=True, files=("config.json", "NOTICE"))
    assert len(warnings) == 2
    assert "LICENSE" in warnings[0]
    assert "USE_POLICY.md" in warnings[1]
    assert check_publication(rules, "me/Llama-x", public=True, files=()) == ()
    assert missing_files(rules, ("Licence.txt", "use_policy.md", "Notice.txt")) == ()


def test_the_words_each_licence_wants() -> None:
    for licence in LLAMAS:
        assert rules_for(licence).credit == "Built with Llama"
    assert rules_for("llama2").credit is None
    assert rules_for("other", "qwen-research").credit == "Built with Qwen"
    notice = notice_text(rules_for("llama3.2"), "Llama-3.2-1B")
    assert notice is not None
    assert notice.startswith("Llama 3.2 is licensed under the Llama 3.2 Community License, ")
    assert "Built with Llama" in notice
    assert "Llama-3.2-1B was converted" in notice
    assert notice_text(rules_for("mit"), "x") is None
    assert "LLAMA 2 Community License" in (notice_text(rules_for("llama2"), "x") or "")
    assert "ai.google.dev/gemma/terms" in (notice_text(rules_for("gemma"), "x") or "")


def test_a_notice_is_written_where_there_is_none(tmp_path: Path) -> None:
    source = {
        "license": "other",
        "license_name": "llama3.1",
        "repo_id": None,
        "given": "/home/me/Llama-X/",
    }
    write_notice(tmp_path, source)
    written = (tmp_path / "NOTICE").read_text()
    assert written.startswith("Llama 3.1 is licensed under")
    assert "Llama-X was converted" in written
    assert "/home" not in written
    (tmp_path / "NOTICE").rename(tmp_path / "Notice.txt")
    write_notice(tmp_path, source)
    assert [path.name for path in tmp_path.iterdir()] == ["Notice.txt"]


def test_no_notice_where_none_is_asked_for(tmp_path: Path) -> None:
    for licence in ("apache-2.0", "mit", None):
        write_notice(
            tmp_path, {"license": licence, "license_name": None, "repo_id": "a/b", "given": "a/b"}
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rules", [rules for _, rules in TABLE], ids=lambda rules: rules.title)
def test_the_table_is_sound(rules: LicenceRules) -> None:
    assert rules.title
    assert rules.link is None or rules.link.startswith("https://")
    assert rules.notice is None or any(fnmatchcase("NOTICE", p) for p in rules.files)
    for sentence in rules.conditions:
        assert sentence.endswith(".")
        assert sentence == " ".join(sentence.split())
