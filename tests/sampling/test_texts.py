"""Texts of tokens and their lines: nothing broken, nothing that moves a cursor, nothing lost."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import pytest
from factory import FAMILIES, TOKENIZERS
from rich.cells import cell_len

from dllm_convert.common.shown_text import BROKEN, printable
from dllm_convert.sampling.watch.layout import wrap
from dllm_convert.sampling.watch.pieces import END, NEWLINE, TokenText, visible

HARD = "Ünïcödé 世界 👩‍👧 e\u0301 \x1b[31m\x07\u202e\u200b\n\n\ttab नमस्ते"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_pieces_join_to_the_text(family: str) -> None:
    tokenizer = TOKENIZERS[family]()
    for text in ("A name is bound in a block.", "if x:\n    return  y", HARD):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id in ids:
            continue
        joined = "".join(TokenText(tokenizer).texts(ids))
        expected = visible(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        assert joined.strip() == expected.strip()
        assert BROKEN not in joined or text == HARD


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "roberta"])
def test_a_character_of_several_tokens_appears_when_all_are_there(family: str) -> None:
    tokenizer = TOKENIZERS[family]()
    ids: list[int | None] = list(tokenizer("a界b", add_special_tokens=False)["input_ids"])
    text = TokenText(tokenizer)
    assert len(ids) == 5
    assert text.texts(ids) == ("a", "", "", "界", "b")
    for gap in (1, 2, 3):
        partly = [None if position == gap else token for position, token in enumerate(ids)]
        shown = "".join(text.texts(partly))
        assert "界" not in shown
        assert BROKEN in shown
        assert shown.startswith("a") and shown.endswith("b")


def test_special_tokens() -> None:
    tokenizer = TOKENIZERS["llama"]()
    begin, end, other = (tokenizer.convert_tokens_to_ids(t) for t in ("<|begin|>", "<|end|>", "a"))
    text = TokenText(tokenizer, frozenset([end]))
    assert text.texts([begin, other, end, begin, end], 3) == ("", "a", "", "<|begin|>", END)


def dangerous(text: str) -> list[str]:
    kinds = ("Cc", "Cs", "Co", "Zl", "Zp")
    overrides = "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200e\u200f\ufeff"
    return [c for c in text if unicodedata.category(c) in kinds or c in overrides]


def test_nothing_shown_is_obeyed() -> None:
    every = "".join(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000)
    assert dangerous(visible(every).replace("\n", "")) == []
    assert dangerous(printable(every).replace("\n", "").replace("\t", "")) == []
    assert printable("a\tb\nc") == "a\tb\nc"
    assert visible("a\r\nb") == f"a{NEWLINE}\nb"


@pytest.mark.parametrize("columns", [2, 3, 7, 20, 80])
def test_lines_fit_and_keep_everything(columns: int) -> None:
    draw = random.Random(columns)
    alphabet = [*"abcdef   ", "世", "é", "e\u0301", f"{NEWLINE}\n"]
    for _ in range(60):
        texts = ["".join(draw.choices(alphabet, k=draw.randrange(6))) for _ in range(30)]
        lines = wrap(texts, columns)
        for line in lines:
            assert sum(segment.width for segment in line) <= columns
            column = 0
            for segment in line:
                assert segment.column == column
                column += segment.width
        back: dict[int, str] = dict.fromkeys(range(len(texts)), "")
        for line in lines:
            for segment in line:
                back[segment.cell] += segment.text
        assert list(back.values()) == [text.replace("\n", "") for text in texts]


def test_lines_break_between_words() -> None:
    lines = wrap(["The quick", " brown", " fox", "es jump"], 10)
    assert ["".join(part.text for part in line) for line in lines] == [
        "The quick ",
        "brown ",
        "foxes jump",
    ]
    assert [part.cell for part in lines[2]] == [2, 3]


def test_many_blank_lines_take_one() -> None:
    lines = wrap(["a", visible("\n\n\n\n"), "b"], 20)
    assert ["".join(p.text for p in line) for line in lines] == [f"a{NEWLINE}", f"{NEWLINE * 3}b"]


def test_wide_text_is_measured_in_columns() -> None:
    text: Any = "世界" * 10
    assert {sum(p.width for p in line) for line in wrap([text], 9)} == {8}
    assert cell_len(text) == 40
