"""Holding out, order and resuming: which rows are trained on, and which never."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from transformers import AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.data.content import Document
from dllm_convert.training.data.encoding import Encoder
from dllm_convert.training.data.reading import Split
from dllm_convert.training.data.streaming import StreamedRows, TextStream
from dllm_convert.training.data.text import TextData, prepare_data

QUIET = Reporter(quiet=True)


def recipe(source: object, *, block: int = 4, seed: int = 0, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "source": "x",
            "target": "bd3lm",
            "block_size": block,
            "data": {"source": str(source), "sequence_length": 32, **data},
            "training": {"steps": 5, "batch_size": 2, "seed": seed},
        }
    )


@pytest.fixture
def tokenizer(source_cache: SourceFactory) -> Any:
    return AutoTokenizer.from_pretrained(source_cache("llama"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty documents of one number each in four files, ten of them twice."""
    folder = tmp_path / "texts"
    folder.mkdir()
    numbers = [*range(60), *range(10)]
    for part in range(4):
        lines = [json.dumps({"text": f"n{n:02}n " * (4 + n)}) for n in numbers[part::4]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return folder


def take(data: TextData, count: int, start: int = 0) -> list[dict[str, Any]]:
    rows = data.training_rows(start=start, total=start + count)
    if data.streaming:
        return list(islice(iter(rows), count))
    return [rows[number] for number in range(start, start + count)]


def fingerprint(row: dict[str, Any]) -> tuple[int, ...]:
    return (*row["input_ids"].tolist(), *row["segment_ids"].tolist())


def numbers(tokenizer: Any, rows: Any) -> set[str]:
    text = " ".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    return {word for word in text.replace("n", " ").split() if len(word) == 2}


def test_a_document_ends_with_its_end_token(source_cache: SourceFactory) -> None:
    for family, start, end in (("llama", "bos", "eos"), ("bert", "cls", "sep")):
        tokenizer = AutoTokenizer.from_pretrained(source_cache(family))
        encoder = Encoder(tokenizer, recipe("pydoc").data)
        first, second = encoder.encode([Document("one two", "x"), Document("three", "y")])
        last = getattr(tokenizer, f"{end}_token_id")
        assert first.ids[0] == getattr(tokenizer, f"{start}_token_id")
        assert first.ids[-1] == second.ids[-1] == last
        assert (first.ids == last).sum() == 1


@pytest.mark.parametrize("streaming", ["off", "on"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_no_held_out_document_nor_a_copy_of_it_is_trained_on(
    streaming: str, fraction: float, texts: Path, tokenizer: Any
) -> None:
    fields = {"streaming": streaming, "held_out_fraction": fraction, "held_out_sequences": 999}
    data = prepare_data(recipe(texts, **fields), tokenizer, QUIET)
    trained = numbers(tokenizer, [row["input_ids"] for row in take(data, 300)])
    held_out = numbers(tokenizer, [row for batch in data.held_out for row in batch.tokens])
    assert trained and held_out
    assert not trained & held_out
    assert trained | held_out == {f"{number:02}" for number in range(60)}


def test_the_split_depends_on_the_content_alone(texts: Path, tokenizer: Any) -> None:
    def held_out(**fields: Any) -> list[Any]:
        data = prepare_data(recipe(texts, held_out_fraction=0.3, **fields), tokenizer, QUIET)
        return [batch.tokens.tolist() for batch in data.held_out]

    first = held_out()
    assert held_out(seed=1) == held_out(streaming="on") == held_out(streaming="on", seed=2) == first
    everything = {"held_out_sequences": 999}
    backwards = ",".join(str(texts / f"{part}.jsonl") for part in (3, 1, 0, 2))
    again = prepare_data(
        recipe(backwards, held_out_fraction=0.3, **everything), tokenizer, QUIET
    ).held_out
    assert numbers(tokenizer, [row for batch in again for row in batch.tokens]) == numbers(
        tokenizer, [row for rows in held_out(**everything) for row in rows]
    )


def test_white_space_makes_no_other_document() -> None:
    assert Document("a  b\n", "x").key == Document(" a b", "y").key != Document("ab", "z").key
    turns = tuple({"role": role, "content": "a"} for role in ("user", "assistant"))
    assert Document(turns, "x").key == Document(tuple(dict(turn) for turn in turns), "y").key
    share = sum(Split.by_fraction(0.2).holds_out(Document(str(i), "").key) for i in range(5000))
    assert 900 < share < 1100


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_text_given_for_measuring_is_not_trained_on_either(
    streaming: str, texts: Path, tokenizer: Any, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"n{n:02}n  " * (4 + n)}) for n in (3, 30, 71, 72)]
    measured = tmp_path / "measured"
    measured.mkdir()
    (measured / "a.jsonl").write_text("\n".join(lines))
    fields = {"held_out_source": str(measured), "streaming": streaming}
    data = prepare_data(recipe(f"{texts}/*.jsonl", **fields), tokenizer, QUIET)
    held_out = numbers(tokenizer, [row for batch in data.held_out for row in batch.tokens])
    trained = numbers(tokenizer, [row["input_ids"] for row in take(data, 300)])
    assert held_out == {"03", "30", "71", "72"}
    assert trained == {f"{n:02}" for n in range(60) if n not in (3, 30)}
    assert data.facts["held_out"]["source"] == str(measured)


def test_every_epoch_sees_every_row_once_in_a_new_order(texts: Path, tokenizer: Any) -> None:
    data = prepare_data(recipe(texts), tokenizer, QUIET)
    count = data.facts["rows"]
    epochs = [[fingerprint(r) for r in take(data, count, start=e * count)] for e in range(3)]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = prepare_data(recipe(texts, seed=1), tokenizer, QUIET)
    assert [fingerprint(r) for r in take(other, count)] not in epochs


def small_windows(data: TextData, tokens: int = 300) -> TextData:
    assert isinstance(data.train, TextStream)
    object.__setattr__(data.train, "window_tokens", tokens)
    return data


@pytest.mark.parametrize("bookmarks", ["kept", "lost", "torn"])
def test_a_stream_goes_on_at_any_row(
    bookmarks: str, texts: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm_convert.training.data.reading.BATCH_DOCUMENTS", 3)

    def rows(folder: str, start: int, count: int) -> list[tuple[int, ...]]:
        fields = {"streaming": "on", "held_out_fraction": 0.2}
        data = prepare_data(recipe(texts, **fields), tokenizer, QUIET, tmp_path / folder)
        return [fingerprint(row) for row in take(small_windows(data), count, start)]

    whole = rows("whole", 0, 400)
    assert len(set(whole)) > 50
    for start in (0, 1, 7, 50, 131, 399):
        first = rows("parts", 0, start)
        assert first == whole[:start]
        marks = tmp_path / "parts/bookmarks.jsonl"
        if bookmarks == "lost":
            marks.unlink(missing_ok=True)
        elif bookmarks == "torn" and marks.exists():
            marks.write_text(marks.read_text()[:-20])
        assert rows("parts", start, 400 - start) == whole[start:]


def test_a_stream_does_not_read_again_what_a_bookmark_spares_it(
    texts: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm_convert.training.data.reading.BATCH_DOCUMENTS", 3)
    data = small_windows(
        prepare_data(recipe(texts, streaming="on"), tokenizer, QUIET, tmp_path / "w")
    )
    take(data, 200)
    again = small_windows(
        prepare_data(recipe(texts, streaming="on"), tokenizer, QUIET, tmp_path / "w")
    )
    read = again.train.reader.tally.read
    take(again, 1, start=199)
    assert again.train.reader.tally.read - read < 40


def test_an_epoch_of_a_stream_has_every_document_once(
    texts: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm_convert.training.data.reading.BATCH_DOCUMENTS", 3)
    streamed = small_windows(prepare_data(recipe(texts, streaming="on"), tokenizer, QUIET))
    prepared = prepare_data(recipe(texts, streaming="off"), tokenizer, QUIET)

    def tokens(rows: list[dict[str, Any]]) -> Counter[int]:
        return Counter(
            t for row in rows for t in row["input_ids"][row["segment_ids"] >= 0].tolist()
        )

    epoch = prepared.facts["train_tokens"]
    rows = iter(streamed.training_rows(start=0, total=0))
    seen: list[dict[str, Any]] = []
    while sum((row["segment_ids"] >= 0).sum() for row in seen) < epoch - 1:
        seen.append(next(rows))
    short = tokens(take(prepared, prepared.facts["rows"]))
    # Pieces of one token are left out, which a different cut would not change.
    assert tokens(seen) == short


def test_reading_twice_gives_the_same_folder(texts: Path, tokenizer: Any, tmp_path: Path) -> None:
    first = prepare_data(recipe(texts), tokenizer, QUIET, tmp_path / "w")
    for file in texts.glob("*.jsonl"):
        file.unlink()
    again = prepare_data(recipe(texts), tokenizer, QUIET, tmp_path / "w")
    assert again.facts == first.facts
    assert [fingerprint(r) for r in take(again, 50)] == [fingerprint(r) for r in take(first, 50)]


def test_a_reading_that_was_killed_is_done_again(
    texts: Path, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "w/text.partial").mkdir(parents=True)
    (tmp_path / "w/text.partial/tokens.bin").write_bytes(b"\0" * 7)
    (tmp_path / "w/text").mkdir()
    data = prepare_data(recipe(texts), tokenizer, QUIET, tmp_path / "w")
    assert data.facts["documents"] > 30


def test_one_document_is_cut_in_two(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "one.txt").write_text("a tale of two cities " * 40)
    data = prepare_data(recipe(tmp_path), tokenizer, QUIET)
    assert data.facts["train_tokens"] > 5 * data.facts["held_out_tokens"] > 0


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty(fraction: float, texts: Path, tokenizer: Any) -> None:
    data = prepare_data(recipe(texts, held_out_fraction=fraction), tokenizer, QUIET)
    trained, held_out = data.facts["documents"], data.facts["held_out_documents"]
    smaller, larger = sorted((trained, held_out))
    assert 1 <= smaller <= 2 < larger  # A document or its copy.
    assert (held_out > trained) == (fraction > 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no text"),
        (" \n ", "holds no text"),
        ("ab", "fewer than one block of 16"),
        ("one two three four five six seven eight nine ten", "held-out tokens"),
    ],
)
@pytest.mark.parametrize("streaming", ["off", "on"])
def test_too_little_text(
    tmp_path: Path, tokenizer: Any, text: str, message: str, streaming: str
) -> None:
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        prepare_data(recipe(tmp_path, block=16, streaming=streaming), tokenizer, QUIET)
    if streaming == "off":
        assert message in caught.value.message
    assert caught.value.hint


def test_an_endless_search_for_text_ends(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "copy " * 40}))
    fields = {"streaming": "on", "held_out_source": str(tmp_path / "a.jsonl")}
    data = prepare_data(recipe(tmp_path, **fields), tokenizer, QUIET)
    with pytest.raises(DataError, match="no text to train on"):
        next(iter(data.training_rows(start=0, total=1)))


def test_only_the_first_documents(
    texts: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm_convert.training.data.reading.BATCH_DOCUMENTS", 3)
    for streaming in ("off", "on"):
        fields = {"max_documents": 12, "streaming": streaming, "held_out_fraction": 0.3}
        data = prepare_data(recipe(texts, **fields), tokenizer, QUIET)
        data = small_windows(data) if data.streaming else data
        rows = [row["input_ids"] for row in take(data, 200)]
        held_out = [row for batch in data.held_out for row in batch.tokens]
        assert len(numbers(tokenizer, rows) | numbers(tokenizer, held_out)) == 12


def test_a_short_training_reads_a_part(texts: Path, tokenizer: Any) -> None:
    many = texts / "many"
    many.mkdir()
    (many / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{n} " * 30}) for n in range(5000))
    )
    data = prepare_data(recipe(many, held_out_sequences=2), tokenizer, QUIET)
    assert data.facts["read"] < 1000


def test_rows_of_both_kinds_make_batches(texts: Path, tokenizer: Any) -> None:
    from dllm_convert.training.data.rows import collate, text_batch

    for streaming in ("off", "on"):
        data = prepare_data(recipe(texts, streaming=streaming), tokenizer, QUIET)
        batch = text_batch(collate(take(data, 3)))
        assert batch.tokens.shape == batch.scorable.shape == (3, 32)
        assert batch.tokens.dtype == batch.positions.dtype == torch.int64
        assert batch.scorable.any()


def test_a_stream_refuses_workers_that_would_repeat_it(texts: Path, tokenizer: Any) -> None:
    data = prepare_data(recipe(texts, streaming="on"), tokenizer, QUIET)
    rows = data.training_rows(start=0, total=4)
    assert isinstance(rows, StreamedRows)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="dataloader_num_workers must be 0"):
        next(iter(loader))
