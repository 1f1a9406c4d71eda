"""Packing, holding out, and too little text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from transformers import AutoTokenizer

from dllm_convert.console import Reporter
from dllm_convert.errors import DataError
from dllm_convert.schema import Recipe
from dllm_convert.training.data import encode, pack, prepare_data


def recipe(source: object, *, block: int = 4, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "source": "x",
            "target": "bd3lm",
            "block_size": block,
            "data": {"source": str(source), "sequence_length": 32, **data},
            "training": {"steps": 5, "batch_size": 2},
        }
    )


def test_packing_keeps_every_token_and_separates_documents() -> None:
    documents = [list(range(10, 17)), list(range(20, 23)), list(range(30, 43)), [50], [60, 61]]
    rows = pack(documents, 8, pad=0)
    assert all(len(row.tokens) == len(row.segments) == len(row.positions) == 8 for row in rows)
    pieces: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, row in enumerate(rows):
        for token, segment, position in zip(row.tokens, row.segments, row.positions, strict=True):
            if segment >= 0:
                pieces.setdefault((number, segment), []).append((position, token))
            else:
                assert token == 0
    for piece in pieces.values():
        assert [position for position, _ in piece] == list(range(len(piece)))
        tokens = [token for _, token in piece]
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    seen = sorted(token for piece in pieces.values() for _, token in piece)
    assert seen == sorted(token for document in documents for token in document if token != 50)


def test_a_document_ends_with_its_end_token(source_cache: SourceFactory) -> None:
    llama = AutoTokenizer.from_pretrained(source_cache("llama"))
    ids = encode(llama, "one two")
    assert (ids[0], ids[-1]) == (llama.bos_token_id, llama.eos_token_id)
    bert = AutoTokenizer.from_pretrained(source_cache("bert"))
    ids = encode(bert, "one two")
    assert (ids[0], ids[-1], ids.count(bert.sep_token_id)) == (
        bert.cls_token_id,
        bert.sep_token_id,
        1,
    )


def test_held_out_documents_are_never_trained_on(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source_cache("llama"))
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02} " * 20)
    data = prepare_data(recipe(tmp_path, held_out_fraction=0.3), tokenizer, Reporter(quiet=True))
    assert data.facts["documents"] + data.facts["held_out_documents"] <= 30
    assert data.facts["held_out_documents"] >= 1
    assert data.facts["kind"] == "files"

    def words(rows: list[list[int]]) -> set[str]:
        return {
            word for row in rows for word in tokenizer.decode(row, skip_special_tokens=True).split()
        }

    train = words(data.train["input_ids"])
    held_out = words([row for batch in data.held_out for row in batch.tokens.tolist()])
    assert not {word for word in train & held_out if len(word) == 2}
    again = prepare_data(recipe(tmp_path, held_out_fraction=0.3), tokenizer, Reporter(quiet=True))
    assert again.train["input_ids"] == data.train["input_ids"]


def test_one_document_is_cut_in_two(tmp_path: Path, source_cache: SourceFactory) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source_cache("llama"))
    (tmp_path / "one.txt").write_text("a tale of two cities " * 40)
    data = prepare_data(recipe(tmp_path), tokenizer, Reporter(quiet=True))
    assert data.facts["train_tokens"] > 5 * data.facts["held_out_tokens"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no text"),
        ("ab", "fewer than one block of 16"),
        ("one two three four five six seven eight nine ten", "held-out tokens"),
    ],
)
def test_too_little_text(
    tmp_path: Path, source_cache: SourceFactory, text: str, message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source_cache("llama"))
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare_data(recipe(tmp_path, block=16), tokenizer, Reporter(quiet=True))
