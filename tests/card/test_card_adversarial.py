"""Whatever a run recorded, the card shows it as itself: no markup, no HTML, no local path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_cases import CASES, Manifest, adapter, bert_mdlm, changed, fill, llama_bd3lm
from markdown_it import MarkdownIt
from markdown_it.token import Token

from dllm_convert.card import text as card_text
from dllm_convert.card.readme import write_card

EVIL = [
    "a|b||c",
    "`tick` ``two`` ```three",
    "line\nbreak\r\n\n# Heading\n\n---\n",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)> &lt; &#60;",
    "[click](javascript:alert(1)) ![x](gone.png)",
    "[x]: https://evil.example",
    "**bold** _under_ ~~struck~~ $x$ a_b_c * d *",
    "{{ facts }} {% raw %} {# c #} None nan TODO",
    "-->\n<!-- hidden",
    "\\",
    "\\| \\` \\[",
    "# # #",
    "- item",
    "+ item",
    "> quote",
    "1. item",
    "2) item",
    "===",
    "| a |\n|---|\n| b |",
    'quote " and \' and \\" end',
    "\u202e\u0000\u2028 \u200b",
    "ends with a backtick `",
    "https://x.org and me@x.org",
    "```\n## Not a section\n```",
    "---\nlicense: mit\n---",
]

PLACES: dict[str, tuple[str, ...]] = {
    "mask token": ("plan", "mask", "token"),
    "mask reason": ("plan", "mask", "reason"),
    "prompt": ("sample", "prompt"),
    "text": ("sample", "text"),
    "device": ("measurements", "train", "device"),
    "version": ("versions", "torch"),
    "tool": ("dllm_convert",),
    "created": ("created",),
    "licence name": ("source", "license_name"),
    "licence link": ("source", "license_link"),
    "dataset": ("measurements", "data", "source"),
    "dataset revision": ("measurements", "data", "revision"),
    "base revision": ("source", "revision"),
    "base id": ("source", "repo_id"),
    "origin": ("source", "origin"),
    "given": ("source", "given"),
    "recipe source": ("recipe", "source"),
    "recipe data": ("recipe", "data", "source"),
    "recipe field": ("recipe", "description"),
}


def put(manifest: Manifest, place: tuple[str, ...], value: Any) -> Manifest:
    *path, last = place
    node = manifest
    for step in path:
        node = node[step]
    node[last] = value
    return manifest


def with_everything(evil: str) -> Manifest:
    """A manifest in which every text of a run that could be foreign is foreign."""
    manifest = llama_bd3lm()
    for place in PLACES.values():
        put(manifest, place, evil)
    manifest["source"] |= {"license": "other", "language": [evil, "en"], "kind": "folder"}
    manifest["plan"] |= {"attention_changes": [evil], "notes": [evil]}
    manifest["measurements"]["data"]["kind"] = "files"
    report = manifest["verification"]
    report["passed"] = False
    for outcome in (True, False, None):
        texts = dict.fromkeys(("name", "measured", "required", "detail"), evil)
        report["probes"].append({**texts, "passed": outcome})
    return manifest


def parse(card: str) -> list[Token]:
    body = card.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)


def flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from flat(token.children or [])


def outline(tokens: list[Token]) -> list[str]:
    places = [i for i, token in enumerate(tokens) if token.type == "heading_open"]
    return [tokens[i].tag + " " + tokens[i + 1].content for i in places][1:]


def links(tokens: list[Token]) -> set[str]:
    found = {str(token.attrGet("href")) for token in flat(tokens) if token.type == "link_open"}
    return found | {str(token.attrGet("src")) for token in flat(tokens) if token.type == "image"}


FOLD = re.compile(r"<details( open)?>\n<summary>[^<>\n]*</summary>\n+|</details>\n*")
"""The only HTML there is: our own, around checks and the recipe."""


def foreign_html(tokens: list[Token]) -> list[str]:
    """HTML that is not our own."""
    found = [token for token in flat(tokens) if token.type.startswith("html")]
    return [t.content for t in found if t.type != "html_block" or not FOLD.fullmatch(t.content)]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[Token]:
    manifest = with_everything("plain words")
    folder = fill(tmp_path_factory.mktemp("usual"), manifest)
    return parse(write_card(folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize("evil", EVIL)
def test_foreign_text_stays_text(tmp_path: Path, usual: list[Token], evil: str) -> None:
    folder = fill(tmp_path, with_everything(evil))
    card = write_card(folder).read_text(encoding="utf-8")
    tokens = parse(card)
    kinds = [token.type for token in flat(tokens)]
    assert not foreign_html(tokens)
    assert kinds.count("html_block") == [t.type for t in flat(usual)].count("html_block")
    assert outline(tokens) == outline(usual)
    assert links(tokens) - {"https://x.org"} == links(usual)
    for kind in ("table_open", "tr_open", "td_open", "fence", "bullet_list_open", "hr"):
        assert kinds.count(kind) == [t.type for t in flat(usual)].count(kind), kind
    front = yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert front["language"] == ["en"]
    assert not {"base_model", "datasets"} & front.keys()
    for code in re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL):
        compile(code, "snippet", "exec")


@pytest.mark.parametrize("evil", EVIL)
def test_a_reader_sees_what_was_recorded(evil: str) -> None:
    """Escaping is undone by the page: the filter neither loses nor adds a character."""
    wanted = " ".join(evil.split()).replace("\u0000", "\ufffd")
    for page in (f"x {card_text.text(evil)} y", f"| a |\n|---|\n| x {card_text.text(evil)} y |\n"):
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page)
        kinds = ("text", "code_inline", "text_special")
        (inline,) = [t for t in tokens if t.type == "inline" and t.content.startswith("x ")]
        seen = "".join(c.content for c in inline.children or [] if c.type in kinds)
        assert seen == f"x {wanted} y"


@pytest.mark.parametrize("evil", [text for text in EVIL if text.strip()])
def test_code_spans_and_blocks_show_what_was_recorded(evil: str) -> None:
    parser = MarkdownIt("commonmark")
    (span,) = (parser.parse(card_text.code(evil))[1].children or [])[:1]
    assert span.type == "code_inline"
    assert span.content == " ".join(evil.split()).replace("\u0000", "\ufffd")
    block, *rest = parser.parse(card_text.fence(evil, "text"))
    assert (block.type, rest) == ("fence", [])
    assert block.content.split() == evil.replace("\u0000", "\ufffd").split()


@pytest.mark.parametrize("evil", EVIL)
def test_a_python_literal_is_the_text(evil: str) -> None:
    assert eval(card_text.python(evil)) == evil


def test_blank_lines_of_a_sample_stay(tmp_path: Path) -> None:
    manifest = llama_bd3lm()
    manifest["sample"]["text"] = " one\n\n\n\n\ntwo"
    card = write_card(fill(tmp_path, manifest)).read_text()
    assert "A name is one\n\n\n\n\ntwo\n```" in card
    assert "\n\n\n" not in re.sub(r"^```.*?^```$", "code", card, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "name",
    ["LICENSE (old) [1].md", "LICENSE`x`", "LICENSE & more.txt", "LICENSE<b>", "LICENSE%20a"],
)
def test_odd_names_of_licence_files(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path, bert_mdlm())
    (folder / name).touch()
    tokens = parse(write_card(folder).read_text())
    assert not foreign_html(tokens)
    assert len([link for link in links(tokens) if link.startswith("LICENSE")]) == 2


SECRET = "somebody-secret"
PATHS = [
    f"/home/{SECRET}/models/base",
    f"/mnt/{SECRET}/a b/base",
    f"C:\\Users\\{SECRET}\\base",
    f"\\\\server\\{SECRET}\\base",
    f"~/{SECRET}/base",
    f"../{SECRET}/base",
    f"/{SECRET}/base/",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [llama_bd3lm, bert_mdlm, adapter])
def test_no_local_path_leaks(tmp_path: Path, make: Callable[[], Manifest], path: str) -> None:
    local = {"kind": "folder", "given": path, "repo_id": None, "revision": None, "origin": None}
    manifest = changed(make(), source=local)
    manifest["recipe"]["source"] = path
    manifest["recipe"]["data"]["source"] = f"{path}/a.txt,{path}/*.md"
    manifest["measurements"]["data"] |= {"source": f"{path}/a.txt,{path}/*.md", "kind": "files"}
    manifest["stages"] = [{"name": "materialise", "seconds": 1, "result": {"folder": path}}]
    manifest["verification"]["probes"] += [
        {
            "name": "portable",
            "passed": passed,
            "measured": f"OSError: {path}/config.json is missing",
            "required": f"loads from '{path}'",
            "detail": f'File "{path}/modeling_dllm.py", line 3',
        }
        for passed in (False, None)
    ]
    manifest["verification"]["passed"] = False
    card = write_card(fill(tmp_path / "out", manifest)).read_text(encoding="utf-8")
    assert SECRET not in card
    assert str(tmp_path) not in card
    assert "config.json is missing" in card


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_an_old_manifest_has_less_to_say(tmp_path: Path, make: Callable[[], Manifest]) -> None:
    """Manifests of version 0.1.0 lack what was recorded later; their card still comes out."""
    manifest = make()
    for key in ("license_name", "license_link", "language", "origin"):
        manifest["source"].pop(key, None)
    for key in ("device", "devices"):
        del manifest["measurements"]["train"][key]
    del manifest["measurements"]["data"]["kind"]
    manifest.pop("stages")
    (fill(tmp_path, manifest) / "config.json").write_text("broken")
    assert "## Limits" in write_card(tmp_path).read_text()


LINKS = [
    "https://x.org/a) <img src=x onerror=alert(1)> [b](https://evil.example",
    "https://x.org/\n\n# Heading\n\n<script>alert(1)</script>",
    "https://x.org/\u202egpj.exe\x1b[31m",
    'https://x.org/"onmouseover="alert(1)',
]


@pytest.mark.parametrize("link", LINKS)
def test_a_licence_link_is_a_target_and_nothing_else(tmp_path: Path, link: str) -> None:
    stated = {"license": "other", "license_name": "theirs", "license_link": link}
    folder = fill(tmp_path / "m", changed(llama_bd3lm(), source=stated))
    (folder / "LICENSE").unlink()
    page = write_card(folder).read_text(encoding="utf-8")
    found = yaml.safe_load(page.split("\n---\n", 1)[0])["license_link"]
    assert re.fullmatch(r"https://x\.org/[!-~]*", found)
    assert not re.search(r"[<>()\[\]\"]", found)
    assert not re.search("[\x1b\u202e]", page)
    tokens = parse(page)
    assert found in links(tokens)
    assert not foreign_html(tokens)
    assert not [title for title in outline(tokens) if "Heading" in title]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_nothing_that_acts_reaches_the_card(tmp_path: Path, place: tuple[str, ...]) -> None:
    folder = fill(tmp_path / "m", put(llama_bd3lm(), place, "a\x1b[2J\u202eb\u2066"))
    page = write_card(folder).read_text(encoding="utf-8")
    assert not re.search("[\x1b\u202e\u2066]", page)
