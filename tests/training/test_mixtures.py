"""Mixtures: whose turn it is after any number of rows, and what is never trained on."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from transformers import AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.training.data.documents import open_corpus
from dllm_convert.training.data.text import TextData, prepare_data
from dllm_convert.training.data.turns import Turns

QUIET = Reporter(quiet=True)


def shares(*weights: int) -> list[Fraction]:
    return [Fraction(weight, sum(weights)) for weight in weights]


def check_turns(parts: list[Fraction], rows: int) -> None:
    turns, counts = Turns(parts), [0] * len(parts)
    for row in range(rows):
        text, own = turns.of(row)
        assert own == counts[text]
        counts[text] += 1
        for share, count in zip(parts, counts, strict=True):
            assert abs(count - share * (row + 1)) < 1, (parts, row)
    assert Turns(parts).counts(rows) == tuple(counts)


def test_no_text_is_a_row_ahead_or_behind_after_any_number_of_rows() -> None:
    chance = random.Random(0)
    check_turns([Fraction(1)], 9)
    check_turns(shares(7, 3), 200)
    check_turns(shares(*[1] * 7), 100)
    check_turns(shares(997, 1, 1, 1), 3000)
    for _ in range(150):
        weights = [chance.randrange(1, 10 ** chance.randrange(1, 7)) for _ in range(1, 9)]
        check_turns(shares(*weights[: chance.randrange(1, 9)]), 250)


def test_any_row_is_found_without_those_before() -> None:
    parts = shares(5, 3, 2)
    whole = [Turns(parts).of(row) for row in range(100)]
    assert [Turns(parts).of(row) for row in reversed(range(100))] == whole[::-1]
    # After a period (of ten rows here) everything repeats: a row far away is not far to count.
    assert Turns(parts).of(10**12 + 3) == (whole[3][0], 10**11 * 10 * parts[whole[3][0]] + 0 + (
        whole[3][1]))  # fmt: skip
    for wrong in ([Fraction(1, 2)], [Fraction(1), Fraction(0)]):
        with pytest.raises(ValueError):
            Turns(wrong)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three sets whose documents say where they are from; every tenth of `a` is in `b` too."""
    for name, count in (("a", 60), ("b", 60), ("c", 40)):
        lines = [
            json.dumps({"text": f"{'b' if name == 'a' and n % 10 == 0 else name}{n:02}q " * 9})
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def recipe(texts: Path, line: str, steps: int = 5, **data: Any) -> Recipe:
    named = re.sub(r"\b([abc])(?=:)", rf"{texts}/\1.jsonl", line)
    fields = {f"data.{name}": value for name, value in data.items()}
    known = {
        "target": "bd3lm", "block_size": 4, "data.source": named, "data.sequence_length": 32,
        "training.steps": steps, "training.batch_size": 2, "training.gradient_accumulation": 1,
    }  # fmt: skip
    return load_recipe("x/y", overrides=known | fields)


@pytest.fixture
def tokenizer(source_cache: SourceFactory) -> Any:
    return AutoTokenizer.from_pretrained(source_cache("llama"))


def take(data: TextData, count: int, start: int = 0) -> list[dict[str, Any]]:
    rows = data.training_rows(start=start, total=start + count)
    if data.streaming:
        found = iter(rows)
        taken = list(islice(found, count))
        found.close()  # type: ignore[attr-defined]
        return taken
    return [rows[start + number] for number in range(count)]


def said(tokenizer: Any, row: Any) -> list[str]:
    return re.findall(r"([abc]\d\d)q", tokenizer.decode(row))


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_weights_are_exact_after_any_number_of_rows(
    streaming: str, texts: Path, tokenizer: Any
) -> None:
    line = "a:[1:60]:0.5,b:[:50]:0.3,c:[:]:0.2"
    data = prepare_data(recipe(texts, line, streaming=streaming), tokenizer, QUIET)
    assert data.streaming == (streaming == "on")
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    counts: Counter[str] = Counter()
    turns = Turns([share for share, _ in recipe(texts, line).data.texts])
    for number, row in enumerate(take(data, 90), start=1):
        sources = {name[0] for name in said(tokenizer, row["input_ids"])}
        own = "abc"[turns.of(number - 1)[0]]
        assert sources <= ({"a", "b"} if own == "a" else {own})
        counts[own] += 1
        assert all(abs(counts[name] - weight * number) < 1 for name, weight in weights.items())
    facts = data.facts
    assert facts["kind"] == "mixture" and [t["share"] for t in facts["texts"]] == [0.5, 0.3, 0.2]
    assert facts["streaming"] == data.streaming


@pytest.mark.parametrize("streaming", ["off", "on", "mixed"])
def test_it_goes_on_at_any_row(
    streaming: str, texts: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm_convert.training.data.reading.BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("dllm_convert.training.data.streaming.WINDOW_TOKENS", 200)
    asked = recipe(texts, "a:[1:]:0.5,c:[:]:0.5", streaming="off" if streaming == "off" else "on")
    work = tmp_path / "work"
    if streaming == "mixed":
        # A text that an earlier call tokenised stays so.
        prepare_data(recipe(texts, "a:[1:]:0.5,c:[:]:0.5", streaming="off"), tokenizer, QUIET, work)
        (work / "text-1/text").rename(tmp_path / "gone")
    whole = [r["input_ids"].tolist() for r in take(prepare_data(asked, tokenizer, QUIET, work), 80)]
    assert len({tuple(row) for row in whole}) > 30
    for start in (1, 2, 17, 43):
        data = prepare_data(asked, tokenizer, QUIET, work)
        assert data.streaming == (streaming != "off")
        rest = [row["input_ids"].tolist() for row in take(data, 80 - start, start)]
        assert rest == whole[start:], start


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_nothing_that_one_text_holds_out_is_trained_on_in_another(
    streaming: str, texts: Path, tokenizer: Any
) -> None:
    # A large share, so that many of the copies are held out; and `c` is a single document twice.
    for name in ("c", "d"):
        (texts / f"{name}.jsonl").write_text(json.dumps({"text": "c00q " * 60}))
    more = "".join(json.dumps({"text": f"a{n}q " * 9}) + "\n" for n in range(60, 99))
    (texts / "d.jsonl").write_text(json.dumps({"text": "c00q " * 60}) + "\n" + more)
    line = f"a:1,b:1,{texts}/d.jsonl:[:]:1"
    asked = recipe(texts, line, streaming=streaming, held_out_fraction=0.4, held_out_sequences=400)
    data = prepare_data(asked, tokenizer, QUIET)
    held_out = {n for batch in data.held_out for row in batch.tokens for n in said(tokenizer, row)}
    trained = {n for row in take(data, 400) for n in said(tokenizer, row["input_ids"])}
    assert len(held_out) > 30 and len(trained) > 40
    assert not held_out & trained
    # The very same documents as when a text is read alone.
    alone = prepare_data(
        recipe(texts, "a:train", held_out_fraction=0.4, held_out_sequences=400), tokenizer, QUIET
    )
    kept = {n for batch in alone.held_out for row in batch.tokens for n in said(tokenizer, row)}
    assert kept <= held_out


def test_a_text_of_one_document_is_not_trained_on_as_a_copy(texts: Path, tokenizer: Any) -> None:
    for name in ("one", "two"):
        (texts / f"{name}.jsonl").write_text(json.dumps({"text": "c00q " * 60}))
    line = f"{texts}/one.jsonl:1,{texts}/two.jsonl:1"
    with pytest.raises(DataError, match="held out of another text"):
        prepare_data(recipe(texts, line), tokenizer, QUIET)


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_another_text_is_measured_on(streaming: str, texts: Path, tokenizer: Any) -> None:
    fields = {
        "held_out_source": f"{texts}/b.jsonl",
        "streaming": streaming,
        "held_out_sequences": 99,
    }
    data = prepare_data(recipe(texts, "a:3,c:1", **fields), tokenizer, QUIET)
    trained = {n for row in take(data, 300) for n in said(tokenizer, row["input_ids"])}
    assert {name[0] for name in trained} == {"a", "c"}, "a copy of what is measured was trained on"
    assert data.facts["held_out"]["source"] == f"{texts}/b.jsonl"


def test_measured_rows_are_of_all_texts_by_their_shares(texts: Path, tokenizer: Any) -> None:
    fields = {"held_out_fraction": 0.3, "held_out_sequences": 8}
    data = prepare_data(recipe(texts, "b:[:]:3,c:[:]:1", **fields), tokenizer, QUIET)
    rows = [said(tokenizer, row) for batch in data.held_out for row in batch.tokens]
    counts = Counter(names[0][0] for names in rows if names)
    assert counts == {"b": 6, "c": 2}


@pytest.mark.parametrize("split", ["train[:10]", "train[7:23]", "train[50:]", "train[10%:20%]"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_slice_of_files_is_a_slice_of_their_rows(split: str, parts: int, tmp_path: Path) -> None:
    rows = [{"text": f"number {n}"} for n in range(60)]
    for part in range(parts):
        own = rows[part * 60 // parts : (part + 1) * 60 // parts]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, own)))
    corpus = open_corpus(Data(source=str(tmp_path), split=split))
    first, last = re.findall(r"\d*", split.partition("[")[2].replace("%", "").replace("]", ""))[
        0], split.partition(":")[2].rstrip("]%")  # fmt: skip
    scale = 0.6 if "%" in split else 1
    low, high = int(float(first or 0) * scale), int(float(last) * scale) if last else 60
    assert [row for shard in corpus.shards for row in shard.read(0)] == rows[low:high]
    assert corpus.rows == high - low and corpus.size
    # From any row of a shard on, and an error names the row as the file has it.
    shard = corpus.shards[-1]
    inside = list(shard.read(0))
    assert list(shard.read(2)) == inside[2:]
    number = int(inside[0]["text"].split()[1])
    of_file = number - (int(Path(shard.name).stem) * 60 // parts)
    assert shard.place_of(1) == f"{shard.name} line {of_file + 1}"


def test_a_slice_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(DataError, match="holds none of its 1 rows"):
        open_corpus(Data(source=str(tmp_path), split="train[5:9]"))


def test_only_documents_that_contain_a_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "mixed.jsonl"
    rows: list[dict[str, Any]] = [{"text": f"a{n:02}q {'python' if n % 2 else ''} " * 9}
                                  for n in range(40)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    data = prepare_data(recipe(tmp_path, f"{file}:train", containing="python"), tokenizer, QUIET)
    found = {n for row in take(data, 100) for n in said(tokenizer, row["input_ids"])}
    assert found and all(int(name[1:]) % 2 for name in found)
    from dllm_convert.training.data.content import find_documents

    chat = {"messages": [{"role": "user", "content": "in python"},
                         {"role": "assistant", "content": "No."}]}  # fmt: skip
    assert not list(find_documents(chat, Data(containing="python"), "row 1"))
    assert list(find_documents(chat, Data(containing="No"), "row 1"))
