"""Training text: what is read, and what is said about what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dllm_convert.errors import DataError, HubError
from dllm_convert.schema import Data
from dllm_convert.training.documents import read_documents


def read(source: object, **fields: object) -> list[str]:
    return list(read_documents(Data(source=str(source), **fields)))


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


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"body": "here"}')
    assert read(tmp_path / "c.jsonl", text_field="body") == ["here"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not JSON \(Expecting property name"),
        ('{"txt": "x"}', r"line 2 has no text under 'text', it has \['txt'\]"),
        ('{"text": 3}', r"line 2 has no text under 'text'"),
        ("[1]", r"line 2 has no text under 'text', it has list"),
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
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3 is 0xe9\)"),
        ("a.jsonl", b"\x80abc", "not UTF-8"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet"),
    ],
)
def test_binary_as_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"no column 'text', it has \['body'\]"):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize("source", ["missing.txt", "./nowhere", "/nowhere/at/all", "no*.jsonl"])
def test_no_such_file(source: str) -> None:
    with pytest.raises(DataError, match="no file matches"):
        read(source)


def test_a_hub_dataset_without_a_network() -> None:
    with pytest.raises(HubError, match="no dataset 'someone/texts' could be read") as caught:
        read("someone/texts")
    assert "train on files" in str(caught.value)
