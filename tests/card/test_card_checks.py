"""Every fault a card can have is named; a sound one passes, generated or written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_cases import CASES, Manifest, fill, llama_bd3lm
from card_rules import KEYS, card_problems

from dllm_convert.card.checks import check_metadata
from dllm_convert.card.readme import render_card
from dllm_convert.common.hub_names import METADATA_KEYS
from dllm_convert.errors import DataError

BODY = "# Title\n\nText.\n"
INDEX = [
    {
        "name": "x",
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": "org/text", "name": "Text"},
                "metrics": [{"type": "perplexity", "value": 3.5}],
            }
        ],
    }
]


def problems(text: str, folder: Path) -> str:
    """Return what is wrong with a card of ours."""
    return "; ".join(card_problems(text, folder))


def refused(text: str, folder: Path) -> str:
    """Return why somebody else's card is refused, empty if it is not."""
    try:
        check_metadata(text, folder)
    except DataError as error:
        return error.message
    return ""


def with_metadata(**values: Any) -> str:
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n\n{BODY}"


def with_body(body: str) -> str:
    return f"---\nlicense: mit\n---\n\n{body}"


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_our_own_cards_are_sound(tmp_path: Path, make: Callable[[], Manifest]) -> None:
    manifest = make()
    folder = fill(tmp_path, manifest)
    assert problems(render_card(folder, manifest), folder) == ""


@pytest.mark.parametrize(
    "values",
    [
        {"license": "apache-2.0", "language": "en", "tags": ["a"]},
        {"license": "other", "license_name": "x", "license_link": "https://x.org/terms"},
        {"language": ["en", "no", "yue", "code", "multilingual"]},
        {"base_model": "bert-base-uncased", "base_model_relation": "finetune"},
        {"base_model": ["a/b", "c/d"], "base_model_relation": "merge"},
        {"datasets": ["org/text", "squad"]},
        {"pipeline_tag": "fill-mask", "library_name": "peft"},
        {"model-index": INDEX},
        {"new_version": "org/better", "inference": False, "thumbnail": "https://x.org/y.png"},
    ],
    ids=str,
)
def test_sound_metadata(tmp_path: Path, values: dict[str, Any]) -> None:
    assert problems(with_metadata(**values), tmp_path) == ""
    assert refused(with_metadata(**values), tmp_path) == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"licence": "mit"}, "'licence' is not a key the Hub reads, perhaps license is meant"),
        ({"languages": "en"}, "perhaps language is meant"),
        ({"base_models": "a/b"}, "perhaps base_model is meant"),
        ({"model_index": INDEX}, "perhaps model-index is meant"),
        ({"license": "apache2"}, "'apache2' is not a licence id the Hub knows"),
        ({"license": "Apache-2.0"}, "not a licence id"),
        ({"license": None}, "license: None is not"),
        ({"license": {"id": "mit"}}, "not a licence id"),
        ({"license": "other"}, "license: other needs license_name"),
        ({"license": "other", "license_name": ""}, "license_name: '' is not a text"),
        ({"license": "other", "license_name": "x", "license_link": "LICENSE"}, "has no LICENSE"),
        ({"license_link": "TERMS.txt"}, "'TERMS.txt' is not an https address or LICENSE"),
        ({"license_link": "http://x.org"}, "is not an https address"),
        ({"language": "English"}, "'English' is not ISO 639"),
        ({"language": "EN"}, "ISO 639"),
        ({"language": ["en", False]}, "ISO 639"),
        ({"language": "en-US"}, "ISO 639"),
        ({"language": []}, "ISO 639"),
        ({"base_model": "/home/me/llama"}, "is not a model id of the Hub"),
        ({"base_model": "./llama"}, "is not a model id"),
        ({"base_model": "a/b/c"}, "is not a model id"),
        ({"base_model": "a--b/c"}, "is not a model id"),
        ({"base_model": ""}, "is not a model id"),
        ({"base_model": "https://huggingface.co/a/b"}, "is not a model id"),
        ({"base_model_relation": "finetune"}, "base_model_relation needs base_model"),
        ({"base_model": "a/b", "base_model_relation": "lora"}, "is not one of adapter, finetune"),
        ({"datasets": ["my text.txt"]}, "is not dataset ids"),
        ({"datasets": {"a": 1}}, "is not dataset ids"),
        ({"tags": "one"}, "is not a list of texts"),
        ({"tags": [1]}, "is not a list of texts"),
        ({"pipeline_tag": "text_generation"}, "is not a task of the Hub"),
        ({"pipeline_tag": ["text-generation"]}, "is not a task of the Hub"),
        ({"library_name": 3}, "is not a text"),
        ({"model-index": []}, "model-index"),
        ({"model-index": {"name": "x"}}, "model-index"),
        ({"model-index": [{"name": "x", "results": []}]}, "model-index"),
        ({"model-index": [{"results": INDEX[0]["results"]}]}, "model-index"),
    ],
    ids=str,
)
def test_faults_of_metadata(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    text = with_metadata(**values)
    assert words in problems(text, tmp_path)
    # Values are the Hub's to refuse, in a card that a person wrote.
    ours_to_say = ("perhaps", "needs license_name", "needs base_model", "has no LICENSE")
    assert (words in refused(text, tmp_path)) == any(part in words for part in ours_to_say)


@pytest.mark.parametrize("value", ["3.5 ± 1", None, float("nan"), True])
def test_results_are_numbers(tmp_path: Path, value: Any) -> None:
    index = yaml.safe_load(yaml.safe_dump(INDEX))
    index[0]["results"][0]["metrics"][0]["value"] = value
    assert "model-index" in problems(with_metadata(**{"model-index": index}), tmp_path)


def test_a_key_of_ones_own_is_only_let_through_in_ones_own_card(tmp_path: Path) -> None:
    text = with_metadata(license="mit", quantized_by="somebody")
    assert refused(text, tmp_path) == ""
    assert "quantized_by: 'somebody' is not a key" in problems(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BODY, "does not begin with metadata"),
        ("", "does not begin with metadata"),
        (f"\n---\nlicense: mit\n---\n{BODY}", "does not begin with metadata"),
        (f"---\nlicense: mit\n{BODY}", "does not begin with metadata"),
        (f"---\nlicense: 'mit\n---\n{BODY}", "not YAML"),
        (f"---\na: b: c\n---\n{BODY}", "not YAML"),
        (f"---\nlicense: mit\nlicense: mit\n---\n{BODY}", "'license' stands there twice"),
        (f"---\n? [a]\n: b\n---\n{BODY}", "not YAML"),
        (f"---\n!!python/object:os.system x\n---\n{BODY}", "not YAML"),
        (f"---\n- license\n---\n{BODY}", "not a mapping"),
        (f"---\nlicense\n---\n{BODY}", "not a mapping"),
    ],
)
def test_faults_of_the_front(tmp_path: Path, text: str, words: str) -> None:
    assert words in problems(text, tmp_path)
    assert words in refused(text, tmp_path)


def test_windows_line_ends_and_a_byte_order_mark_are_no_fault(tmp_path: Path) -> None:
    text = "\ufeff" + with_body("# A\n\n[x](#a)\n").replace("\n", "\r\n")
    assert problems(text, tmp_path) == refused(text, tmp_path) == ""


@pytest.mark.parametrize(
    "body",
    [
        "# A b: `c`, d-e!\n\n[x](#a-b-c-d-e)\n",
        "# A\n\none\n\n# A\n\n[two](#a-1)\n",
        '<a id="here"></a>\n\n# A\n\n[x](#here)\n',
        "# A\n\n[x](there.md) ![a picture](there.md) [y](there.md#part) [z](sub/with%20space.md)\n",
        "# A\n\n[x](https://x.org/a_(b)) <https://x.org> [m](mailto:me@x.org)\n",
        "# A\n\n[x][ref]\n\n[ref]: there.md\n",
        '# A\n\n[x](there.md "title") [`code`](there.md)\n',
        "# A\n\n| a | b |\n|---|---|\n| `x \\| y` | z |\n",
        "# A\n\n| a | b |\n|:-:|--:|\n| 1 | 2 |\n\n> | a |\n> |---|\n> | b |\n",
        "# A\n\n```python\nx = {{1: None}}  # TODO [x](gone.md)\n| a |\n```\n",
        "# A\n\n````text\n```\nnot closed in here\n````\n\n~~~\nx\n~~~\n",
        "# A\n\n`None` and `{{ x }}` and None of them, a nanosecond, ToDo\n",
        "# A\n\n## B\n\ntext\n\n## C\n\n- item\n",
        "- ```\n  in a list\n  ```\n",
        "> ```\n> quoted\n> ```\n",
        "# A\n\n    indented ```\n\ntext\n",
    ],
)
def test_sound_bodies(tmp_path: Path, body: str) -> None:
    (tmp_path / "there.md").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "with space.md").touch()
    assert problems(with_body(body), tmp_path) == ""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("# A\n\n[x](gone.md)\n", "links to gone.md, which the folder does not have"),
        ("# A\n\n![alt](gone.png)\n", "links to gone.png"),
        ("# A\n\n[x][ref]\n\n[ref]: gone.md\n", "links to gone.md"),
        ('# A\n\n<img src="gone.png" alt="x">\n', "links to gone.png"),
        ('# A\n\ntext <a href="#gone">x</a>\n', "#gone, which no heading has"),
        ("# A\n\n[x](../secret)\n", "links to ../secret"),
        ("# A\n\n[x](/etc/passwd)\n", "links to /etc/passwd"),
        ("# A\n\n[x](//x.org)\n", "names no scheme"),
        ("# A\n\n[x](ftp://x.org/y)\n", "no address of the web"),
        ("# A\n\n[x](there.md)\n", "links to there.md"),
        ("# A\n\n[x](#b)\n", "#b, which no heading has"),
        ("# A\n\n[x](#A)\n", "#A, which no heading has"),
        ("# A\n\none\n\n# A\n\n[x](#a-2)\n", "#a-2"),
        ("# A\n\n[x]()\n", "leads nowhere"),
        ("# A\n\n[](https://x.org)\n", "has no text"),
        ("# A\n\n![](https://x.org/y.png)\n", "no text for those who cannot see"),
        ("# A\n\nthe X(https://x.org)\n", "broken link"),
        ("# A\n\nsee X](https://x.org)\n", "broken link"),
        ("# A\n\n[x](https://x.org and more)\n", "broken link"),
        ("# A\n\n| a | b |\n|---|---|\n| 1 |\n", "has 1 cells, its head 2"),
        ("# A\n\n| a | b |\n|---|---|\n| 1 | 2 | 3 |\n", "has 3 cells, its head 2"),
        ("# A\n\n| a | b |\n|---|\n| 1 | 2 |\n", "without a line of dashes"),
        ("# A\n\n| a | b |\n| 1 | 2 |\n", "without a line of dashes"),
        ("# A\n\n```python\nx\n", "begins with ```python is not closed"),
        ("# A\n\n````\nx\n```\n", "begins with ```` is not closed"),
        ("# A\n\n```\nx\n```\n\n```\n", "not closed"),
        ("# A\n", "section 'A' is empty"),
        ("# A\n\n## B\n\n## C\n\ntext\n", "section 'B' is empty"),
        ("# A\n\ntext\n\n### B\n\n## C\n\ntext\n", "section 'B' is empty"),
        ("# A\n\n[More Information Needed]\n", "placeholder"),
        ("# A\n\nmore information needed\n", "placeholder"),
        ("# A\n\nTODO: write\n", "placeholder"),
        ("# A\n\n| a |\n|---|\n| None |\n", "placeholder"),
        ("# A\n\nperplexity nan\n", "placeholder"),
        ("# A\n\n{{ facts.title }}\n", "placeholder"),
        ("# {% if x %}\n\ntext\n", "placeholder"),
    ],
)
def test_faults_of_the_body(tmp_path: Path, body: str, words: str) -> None:
    assert words in problems(with_body(body), tmp_path)
    assert refused(with_body(body), tmp_path) == ""


def test_the_rules_know_the_keys_of_the_hub() -> None:
    assert tuple(KEYS) == METADATA_KEYS


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    text = "---\nlicence: mit\ntags: x\n---\n\n# A\n\n[x](gone.md) TODO\n\n```\n"
    found = problems(text, tmp_path)
    for words in ("'licence'", "tags", "gone.md", "TODO", "not closed"):
        assert words in found


def test_a_broken_template_is_caught(tmp_path: Path) -> None:
    manifest = llama_bd3lm()
    folder = fill(tmp_path, manifest)
    card = render_card(folder, manifest)
    for old, new in (
        ("[NOTICE](NOTICE)", "[NOTICE](NOTICE.txt)"),
        ("](loss.png)", "](plots/loss.png)"),
        ("|---|---|---|---|\n", "|---|---|---|\n"),
        ("](https://arxiv.org/abs/2406.07524)", "(https://arxiv.org/abs/2406.07524)"),
        ("license: llama3.2", "licence: llama3.2"),
        ("\n## Limits\n", "\n## Limits\n\n## More\n"),
    ):
        assert old in card
        assert problems(card.replace(old, new, 1), folder), old
