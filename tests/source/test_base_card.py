"""What a base says of its licence, languages and origin is read as written, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dllm_convert.source.base_card import BaseCard, base_card, gguf_base_card, read_base_card


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: llama3.2\nlanguage: en", BaseCard("llama3.2", languages=("en",))),
        ("license: 'mit'\nlanguage:\n- en\n- no", BaseCard("mit", languages=("en", "no"))),
        ('license: "apache-2.0"  # yes\ntags: [a]', BaseCard("apache-2.0")),
        (
            "license: other\nlicense_name: qwen-research\nlicense_link: LICENSE",
            BaseCard("other", "qwen-research", "LICENSE"),
        ),
        ("license: [mit, apache-2.0]", BaseCard()),
        ("license: [mit]", BaseCard("mit")),
        ("license:\nlanguage: []", BaseCard()),
        ("license: {id: mit}", BaseCard()),
        ("license: 'unclosed", BaseCard()),
        ("- a list", BaseCard()),
        ("licence: mit", BaseCard()),
    ],
)
def test_front_matter(tmp_path: Path, front: str, expected: BaseCard) -> None:
    readme = tmp_path / "README.md"
    for newline in ("\n", "\r\n"):
        for start in ("", "\ufeff"):
            text = f"{start}---\n{front}\n---\n# Title\nlicense: gpl\n"
            readme.write_text(text.replace("\n", newline), encoding="utf-8", newline="")
            assert read_base_card(readme) == expected


@pytest.mark.parametrize(
    "text", ["", "# Hi\nlicense: mit\n", "\n---\nlicense: mit\n---\n", "---\n"]
)
def test_no_front_matter(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_base_card(tmp_path / "README.md") == BaseCard()


def test_no_readme(tmp_path: Path) -> None:
    assert read_base_card(tmp_path / "README.md") == BaseCard()
    assert read_base_card(tmp_path) == BaseCard()


def test_metadata_of_the_hub() -> None:
    assert base_card({"license": "mit", "language": ["en", None, 3, ""]}) == BaseCard(
        "mit", languages=("en",)
    )


@pytest.mark.parametrize(
    ("metadata", "origin"),
    [
        ({"general.source.huggingface.repository": "org/Model"}, "org/Model"),
        ({"general.source.repo_url": "https://huggingface.co/org/Model"}, "org/Model"),
        ({"general.source.url": "https://huggingface.co/org/Model/"}, "org/Model"),
        ({"general.source.url": "https://huggingface.co/papers/org/Model"}, None),
        ({"general.source.repo_url": "https://github.com/org/Model"}, None),
        ({"general.source.repo_url": "http://huggingface.co.evil.example/org/Model"}, None),
        ({"general.source.huggingface.repository": "../../etc"}, None),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/Ancestor"}, None),
        ({"general.source.repo_url": 3}, None),
    ],
)
def test_origin_of_a_gguf_file(metadata: dict[str, Any], origin: str | None) -> None:
    assert gguf_base_card(metadata).origin == origin


def test_licence_of_a_gguf_file() -> None:
    metadata = {
        "general.license": "other",
        "general.license.name": "gemma",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.languages": ["en", "de"],
    }
    assert gguf_base_card(metadata) == BaseCard(
        "other", "gemma", "https://ai.google.dev/gemma/terms", ("en", "de")
    )
