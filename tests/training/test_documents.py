"""Training text: what is read, and what is said about what cannot be."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dllm_convert.errors import DataError, HubError
from dllm_convert.recipe.schema import Data
from dllm_convert.training.data import file_rows as module
from dllm_convert.training.data.content import LONGEST, find_documents
from dllm_convert.training.data.documents import open_corpus


def read(source: object, *, start: int = 0, **fields: Any) -> list[Any]:
    data = Data(source=str(source), **fields)
    return [
        document.content
        for shard in open_corpus(data).shards
        for number, row in enumerate(shard.read(start), start=start + 1)
        for document in find_documents(row, data, f"{shard.name} {shard.unit} {number}")
    ]


def test_pydoc_is_always_there() -> None:
    texts = read("pydoc")
    assert len(texts) > 50
    assert sum(map(len, texts)) > 200_000


def test_files_globs_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    pq.write_table(pa.table({"text": ["fifth", None]}), tmp_path / "d.parquet")
    assert read(tmp_path) == ["first", "second", "third", "fourth", "fifth"]
    assert read(f"{tmp_path}/*.txt") == ["second"]
    assert read(f"{tmp_path}/c.jsonl,{tmp_path}/a.md") == ["third", "fourth", "first"]


def test_compressed_files_arrays_and_names_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "two"}\n{"text": "three"}'))
    (tmp_path / "c.md.xz").write_bytes(lzma.compress(b"four"))
    (tmp_path / "d.json").write_text('[{"text": "five"}, {"text": "six"}]')
    (tmp_path / "e[1] *?.txt").write_text("seven")
    (tmp_path / "picture.png.gz").write_bytes(gzip.compress(b"not text"))
    assert read(tmp_path) == ["one", "two", "three", "four", "five", "six", "seven"]


def test_lines_need_not_have_the_same_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"more": [1], "text": "two", "id": 3}\n')
    (tmp_path / "b.jsonl").write_text('{"id": "x", "text": "three"}\n{"text": null}\n')
    assert read(tmp_path) == ["one", "two", "three"]


def test_empty_files_are_nothing(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.parquet", "d.json"):
        (tmp_path / name).touch()
    (tmp_path / "e.jsonl").write_text("\n\n")
    assert read(tmp_path) == []


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_file_is_read_on_from_any_row(tmp_path: Path, form: str) -> None:
    texts = [f"text {number}" for number in range(300)]
    if form == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=70)
    else:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    for start in (0, 1, 63, 64, 69, 70, 71, 255, 299, 300):
        assert read(tmp_path, start=start) == texts[start:]


def test_a_large_text_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_TEXT", 1000)
    monkeypatch.setattr(module, "PART_CHARACTERS", 300)
    lines = [f"line {number} é\n" for number in range(200)]
    (tmp_path / "a.txt").write_text("".join(lines))
    parts = read(tmp_path)
    assert "".join(parts) == "".join(lines)
    assert all(300 <= len(part) < 320 for part in parts[:-1])
    assert read(tmp_path, start=3) == parts[3:]


def test_a_huge_document_is_cut_between_words() -> None:
    text = "word " * (LONGEST // 2)
    parts = [d.content for d in find_documents({"text": text}, Data(), "row 1")]
    assert "".join(parts) == text
    assert [len(part) <= LONGEST for part in parts] == [True] * 3
    assert all(part.startswith("word") and part.endswith(" ") for part in parts)
    whole = [d.content for d in find_documents({"text": "x" * (LONGEST + 1)}, Data(), "row 1")]
    assert [len(part) for part in whole] == [LONGEST, 1]


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"body": "here"}')
    assert read(tmp_path / "c.jsonl", text_field="body") == ["here"]
    (tmp_path / "d.txt").write_text("whole")
    assert read(tmp_path / "d.txt", text_field="body") == ["whole"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not JSON \(Expecting property name"),
        ('{"txt": "x"}', r"line 2 has no column 'text', it has \['txt'\]"),
        ('{"text": 3}', r"line 2 holds a int, expected a text or a list of messages"),
        ("[1]", r"line 2 is a JSON list, expected an object"),
    ],
)
def test_a_broken_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0more", "holds binary data"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 text \(0xe9 after 'caf'\)"),
        ("a.jsonl", b"\x80abc", "not UTF-8"),
        ("a.parquet", b"PAR1 not really", r"a.parquet cannot be read as parquet \("),
        ("a.txt.gz", b"not gzip", r"a.txt.gz cannot be read as text \("),
        ("a.json", b"{not json", r"a.json cannot be read as json \("),
    ],
)
def test_binary_as_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d.parquet row 1 has no column 'text', it has \['body'\]"):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize("source", ["missing.txt", "./nowhere", "/nowhere/at/all", "no*.jsonl"])
def test_no_such_file(source: str) -> None:
    with pytest.raises(DataError, match="no file matches"):
        read(source)


def test_a_hub_dataset_without_a_network() -> None:
    with pytest.raises(HubError, match="dataset 'someone/texts'") as caught:
        read("someone/texts")
    assert "train on files" in str(caught.value)
