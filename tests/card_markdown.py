"""Problems of a card's Markdown that a reader would meet: dead links, broken tables, gaps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from dllm_convert.card.text import MISTAKE

if TYPE_CHECKING:
    from markdown_it.token import Token

_SCHEMES = ("https", "http", "mailto")
_HTML_TARGET = re.compile(r"""\b(?:src|href)\s*=\s*["']([^"']*)["']""", re.IGNORECASE)
_HTML_ANCHOR = re.compile(r"""\b(?:id|name)\s*=\s*["']([^"']+)["']""", re.IGNORECASE)
_FENCE = re.compile(r"(`{3,}|~{3,})")


def markdown_problems(body: str, folder: Path) -> Iterator[str]:
    """Yield what is wrong with a card below its metadata.

    Args:
        body: Markdown of GitHub's flavour.
        folder: The checkpoint, for what the card links to.
    """
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    # The parser takes a bare carriage return for a line's end too.
    lines = re.split(r"\r\n?|\n", body)
    anchors = _anchors(tokens)
    for token in tokens:
        if token.type == "fence":
            yield from _fence_problems(token, lines)
        elif token.type == "table_open":
            yield from _table_problems(token, lines)
        elif token.type == "inline":
            yield from _inline_problems(token, anchors, folder)
        elif token.type == "html_block":
            yield from _html_problems(token.content, anchors, folder)
    yield from _empty_sections(tokens)


def _plain(token: Token) -> str:
    """Return what a reader sees of an inline token, code included."""
    children = token.children or ()
    return "".join(child.content for child in children if child.type in ("text", "code_inline"))


def _anchors(tokens: list[Token]) -> set[str]:
    """Return the anchors of all headings, as GitHub and the Hub make them, and of HTML."""
    seen: Counter[str] = Counter()
    found: set[str] = set()
    for token, after in pairwise(tokens):
        if token.type == "heading_open":
            slug = re.sub(r"[^\w\- ]", "", _plain(after).strip().lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    for token in tokens:
        for piece in (token, *(token.children or ())):
            if piece.type in ("html_block", "html_inline"):
                found.update(_HTML_ANCHOR.findall(piece.content))
    return found


def _fence_problems(token: Token, lines: list[str]) -> Iterator[str]:
    """A block that is never closed swallows the rest of the page."""
    start, end = token.map or [0, 0]
    last = lines[end - 1].strip(" >") if end - 1 > start else ""
    closed = _FENCE.fullmatch(last) and last.startswith(token.markup)
    if not closed:
        yield f"the code block that begins with {token.markup}{token.info} is not closed"


def _cells(line: str) -> int:
    row = line.strip().removeprefix("|")
    row = row[:-1] if re.search(r"(?<!\\)\|$", row) else row
    return 1 + len(re.findall(r"(?<!\\)\|", row))


def _table_problems(token: Token, lines: list[str]) -> Iterator[str]:
    start, end = token.map or [0, 0]
    rows = [line for line in lines[start:end] if line.strip()]
    for row in rows[2:]:
        if _cells(row) != _cells(rows[0]):
            yield f"a row of a table has {_cells(row)} cells, its head {_cells(rows[0])}: {row}"


def _inline_problems(token: Token, anchors: set[str], folder: Path) -> Iterator[str]:
    children = token.children or []
    if token.content.startswith("|") and token.level < 4 and "\n|" in token.content:
        yield f"a table without a line of dashes below its head: {token.content.splitlines()[0]}"
    for index, child in enumerate(children):
        if child.type == "text":
            yield from _text_problems(child.content)
        elif child.type == "link_open":
            empty = children[index + 1].type == "link_close"
            target = str(child.attrGet("href"))
            if empty:
                yield f"the link to {target} has no text"
            yield from _link_problems(target, anchors, folder)
        elif child.type == "image":
            target = str(child.attrGet("src"))
            if not child.content.strip():
                yield f"the picture {target} has no text for those who cannot see it"
            yield from _link_problems(target, anchors, folder)
        elif child.type == "html_inline":
            yield from _html_problems(child.content, anchors, folder)


def _text_problems(text: str) -> Iterator[str]:
    for found in MISTAKE.finditer(text):
        around = text[max(0, found.start() - 20) : found.end() + 20]
        yield f"{found[0]!r} in {around!r} is a placeholder or a broken link"


def _html_problems(html: str, anchors: set[str], folder: Path) -> Iterator[str]:
    for target in _HTML_TARGET.findall(html):
        yield from _link_problems(target, anchors, folder)


def _link_problems(target: str, anchors: set[str], folder: Path) -> Iterator[str]:
    parts = urlsplit(target)
    if parts.scheme:
        if parts.scheme not in _SCHEMES:
            yield f"it links to {target}, which is no address of the web"
    elif parts.netloc:
        yield f"it links to {target}, which names no scheme such as https"
    elif parts.path:
        path = PurePosixPath(unquote(parts.path))
        inside = not path.is_absolute() and ".." not in path.parts
        if not inside or not (folder / path).exists():
            yield f"it links to {target}, which the folder does not have"
    elif unquote(parts.fragment) not in anchors:
        yield f"it links to {target}, which no heading has" if target else "a link leads nowhere"


def _empty_sections(tokens: list[Token]) -> Iterator[str]:
    """Yield headings with nothing below them; a deeper heading is something."""
    top = [token for token in tokens if token.level == 0 and not token.type.endswith("_close")]
    places = [i for i, token in enumerate(top) if token.type == "heading_open"]
    names = {
        id(token): _plain(after)
        for token, after in pairwise(tokens)
        if token.type == "heading_open"
    }
    for place in places:
        following = top[place + 1] if place + 1 < len(top) else None
        deeper = (
            following is not None
            and following.type == "heading_open"
            and following.tag > top[place].tag
        )
        if following is None or (following.type == "heading_open" and not deeper):
            yield f"the section {names[id(top[place])]!r} is empty"
