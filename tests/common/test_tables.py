"""Tables and lines for people: aligned on a terminal, real tables in a notebook, nothing obeyed."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from dllm_convert.card.text import table as markdown
from dllm_convert.common.tables import Block, Printed, Table, apart, text_of

NASTY = [
    "<script>",
    "a|b",
    "a&amp;b",
    '"x"',
    "a\nb",
    "\u202eabc",
    "\x1b[31m",
    "",
    None,
    0.123456,
    7,
]
CELL = {"td", "th"}


class Read(HTMLParser):
    """The cells of every table, and whether every element that was opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.others: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in CELL:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if CELL & set(self.open):
            self.rows[-1][-1] += data
        elif data.strip() and "style" not in self.open:
            self.others.append(data)


class Result(Printed):
    def __init__(self, *blocks: Block) -> None:
        self.blocks = list(blocks)

    def as_dict(self) -> dict[str, Any]:
        return {}

    def as_blocks(self) -> list[Block]:
        return self.blocks


def test_columns_are_aligned() -> None:
    rows = [("a", 1.23456, "x"), ("longer", None, "y")]
    assert str(Table(("", "number", "last"), rows)).split("\n") == [
        "        number  last",
        "a       1.235   x",
        "longer          y",
    ]


def test_notes_stand_below_their_row() -> None:
    table = Table(("", "name"), [("ok", "a"), ("no", "b")], {1: ["why", "how"]}, indent=2)
    assert str(table).split("\n")[2:] == ["  no  b", f"{'':11}why", f"{'':11}how"]
    rows = Read(table.as_html()).rows
    assert rows == [["", "name"], ["ok", "a"], ["no", "b"], ["", "why"], ["", "how"]]


@pytest.mark.parametrize("value", NASTY)
def test_nothing_of_a_value_is_obeyed(value: Any) -> None:
    table = Table(("name", "value"), [("first", value), (value, "second")], {0: [str(value)]})
    page = Result("Before", str(value), table, "", "after")._repr_html_()
    read = Read(page)
    assert read.open == []
    assert [len(row) for row in read.rows] == [2, 2, 2, 2]
    assert read.rows[1][1] == table.cells[0][1]
    assert "script" not in read.others
    for text in (page, str(Result(table))):
        assert not set(text) & {"\x1b", "\u202e"}
    assert len(str(table).split("\n")) == 4
    assert len(markdown(table).split("\n")) == 4


def test_text_and_tables_take_turns() -> None:
    table = Table(("a",), [("b",)])
    result = Result("title", table, "", "", table, "end")
    assert result.as_text() == "title\na\nb\n\n\na\nb\nend"
    read = Read(result._repr_html_())
    assert read.rows == [["a"], ["b"]] * 2
    assert read.others == ["title", "end"]
    assert text_of(apart([table, "x", "y"])) == "a\nb\n\nx\n\ny"
    assert text_of(apart([])) == ""


def test_an_empty_table_has_its_header() -> None:
    table = Table(("a", "b"), ())
    assert str(table) == "a  b"
    assert Read(table.as_html("what it shows")).rows == [["a", "b"]]
    assert 'class="unseen">what it shows<' in table.as_html("what it shows")
    assert markdown(Table(("", "b"), [("x", "- y")])) == "| | b |\n|---|---|\n| x | - y |"


def test_columns_without_names_have_no_line_of_them() -> None:
    table = Table(("", ""), [("a", 1), ("bc", 2)], indent=2)
    assert str(table) == "  a   1\n  bc  2"
    assert "thead" not in table.as_html()
    assert '<th scope="row">bc</th><td>2</td>' in table.as_html()
