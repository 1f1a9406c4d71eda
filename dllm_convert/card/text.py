"""Turn facts into Markdown that means what the facts say, whatever characters they hold."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dllm_convert.common.shown_text import printable
from dllm_convert.common.tables import Table

MISTAKE = re.compile(
    r"(?i:\[?more information needed\]?)|\b(?:TODO|FIXME|TBD|nan|None(?! of\b))\b"
    r"|\{\{|\}\}|\{%|%\}|\]\(|\w\(https?://"
)
"""What a forgotten value or a broken link looks like on the page."""

# An underscore inside a word and an ampersand that begins no entity are themselves anyway.
_MARKUP = re.compile(r"[\\`*\[\]<|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")

_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[#>+=-]))([#>+=.)-])")
_GAPS = re.compile(r"(?P<block>^(?P<ticks>`{3,})[^\n`]*\n.*?^(?P=ticks)$)|\n{3,}", re.DOTALL | re.M)


def render(folder: Path, template: str, **facts: Any) -> str:
    """Render a template.

    Args:
        folder: Folder of the templates.
        template: Name of the template.
        **facts: What the template reads; a name it reads and is not given is an error.
    """
    page = _environment(folder).get_template(template).render(**facts)
    # Conditions in the templates leave blank lines; those inside a code block are somebody's text.
    return _GAPS.sub(lambda found: found["block"] or "\n\n", page).rstrip() + "\n"


@cache
def _environment(folder: Path) -> Environment:
    """Return what renders the templates of a folder; it keeps those that it has compiled."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 -- Markdown, and every fact goes through a filter below
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=shown,
    )
    environment.filters |= {
        "address": address,
        "code": code,
        "count": count,
        "duration": duration,
        "fence": fence,
        "figures": figures,
        "python": python,
        "scientific": scientific,
        "table": table,
        "text": text,
    }
    return environment


def shown(value: Any) -> Any:
    """Take what acts on whoever reads a page out of a value: the last thing that is done to it."""
    return type(value)(printable(value)) if isinstance(value, str) else value


def address(value: object) -> str:
    """Write an address as the target of a link: what could end the link is encoded."""
    return quote(printable(str(value)).strip(), safe="/:?#@!$&*+,;=%~-._")


def text(value: object) -> str:
    """Write foreign text as itself: on one line, nothing in it taken for Markdown or HTML.

    What would pass for a mistake of the card, such as a measured nan, becomes a code span.
    """
    # A list item or a paragraph may begin with it: no heading, list or quotation begins there.
    return _BLOCK.sub(r"\1\\\2", _inline(value))


def table(value: Table) -> str:
    """Write a table; every cell is foreign text, and no block can begin in it."""
    rows = [value.header, *([_inline(cell) for cell in row] for row in value.cells)]
    head, *lines = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)
    return "\n".join([head, f"|{'---|' * len(value.header)}", *lines])


def _inline(value: object) -> str:
    line = " ".join(str(value).split())
    parts, end = [], 0
    for found in MISTAKE.finditer(line):
        parts += [_escaped(line[end : found.start()]), code(found[0])]
        end = found.end()
    return "".join([*parts, _escaped(line[end:])])


def _escaped(part: str) -> str:
    return _MARKUP.sub(r"\\\g<0>", part)


def code(value: object) -> str:
    """Make an inline code span, whatever backticks the text has; not for tables."""
    line = " ".join(str(value).split()) or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def fence(value: object, language: str = "") -> str:
    """Make a code block, whatever backticks the text has."""
    block = str(value).rstrip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block)), default=0))
    return f"{ticks}{language}\n{block}\n{ticks}"


def python(value: object) -> str:
    """Make a Python literal; JSON's strings are Python's too."""
    return json.dumps(str(value), ensure_ascii=False)


def count(value: float) -> str:
    """Write a whole number with separators."""
    return f"{int(value):,}"


def figures(value: float, digits: int = 4) -> str:
    """Write a number with a few significant digits."""
    if math.isnan(value):
        return "not a number"
    return f"{value:.{digits}g}" if math.isfinite(value) else "infinite"


def scientific(value: float) -> str:
    """Write a large number with two significant digits."""
    return f"{value:.1e}".replace("e+", "e")


def duration(seconds: float) -> str:
    """Write a duration in the two largest units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
