"""Which files are text: read, refused by name, or left out and said so."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SourceFactory

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.training.data import file_rows
from dllm_convert.training.data.content import find_documents
from dllm_convert.training.data.documents import open_corpus

TEXTS = ["The first.", 'He said "no";\tthen, é猫', "Two\nlines"]


def read(source: object, *, start: int = 0, **fields: Any) -> list[Any]:
    data = Data(source=str(source), **fields)
    return [
        document.content
        for shard in open_corpus(data).shards
        for number, row in enumerate(shard.read(start), start=start + 1)
        for document in find_documents(row, data, f"{shard.name} {shard.unit} {number}")
    ]


def left_out(source: object, **fields: Any) -> set[str]:
    return {Path(name).name for name in open_corpus(Data(source=str(source), **fields)).left_out}


def table(separator: str = ",", texts: list[str] = TEXTS) -> bytes:
    import io

    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def rows(texts: list[str] = TEXTS) -> bytes:
    return json.dumps([{"text": text} for text in texts]).encode()


def arrow(texts: list[str] = TEXTS) -> bytes:
    data = pa.table({"text": texts})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    return bytes(sink.getvalue())


def parquet(texts: list[str] = TEXTS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    return bytes(sink.getvalue())


FORMATS = {
    "a.jsonl": lines(),
    "a.ndjson": lines(),
    "a.csv": table(),
    "b.csv": table(";"),
    "a.tsv": table("\t"),
    "a.json": rows(),
    "columns.json": json.dumps({"id": [1, 2, 3], "text": TEXTS}).encode(),
    "lines.json": lines(),
    "texts.json": json.dumps(TEXTS).encode(),
    "named.json": json.dumps({"version": 1, "data": [{"text": t} for t in TEXTS]}).encode(),
    "a.parquet": parquet(),
    "a.arrow": arrow(),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [str, str.upper])
def test_every_format_of_rows_in_any_case(name: str, case: Any, tmp_path: Path) -> None:
    file = tmp_path / case(name)
    file.write_bytes(FORMATS[name])
    for start in range(4):
        assert read(file, start=start) == TEXTS[start:]
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("name", [n for n in FORMATS if not n.endswith(("parquet", "arrow"))])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_every_format_compressed(name: str, pack: Any, tmp_path: Path) -> None:
    suffix = {gzip.compress: ".gz", bz2.compress: ".BZ2", lzma.compress: ".xz"}[pack]
    (tmp_path / (name + suffix)).write_bytes(pack(FORMATS[name]))
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.csv", "a.json"])
def test_a_byte_order_mark_is_no_text(name: str, encoding: str, tmp_path: Path) -> None:
    content = "Aé猫" if name in ("a.txt", "a.md") else FORMATS[name].decode()
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read(tmp_path) == (["Aé猫"] if name in ("a.txt", "a.md") else TEXTS)


@pytest.mark.parametrize("name", ["a.rst", "a.tex", "A.TXT", "a.Markdown", "a.txt.GZ"])
def test_prose_by_other_names(name: str, tmp_path: Path) -> None:
    content = b"It is."
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert read(tmp_path / name) == read(tmp_path) == read(f"{tmp_path}/*") == ["It is."]


def test_code_is_text_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    assert read(tmp_path / "a.py") == read(f"{tmp_path}/*.py") == ["x = 1\n"]
    with pytest.raises(DataError, match=r"holds no text \(it holds \.py\)") as caught:
        read(tmp_path)
    assert caught.value.hint and "/**/*.py'" in caught.value.hint
    (tmp_path / "b.txt").write_text("prose")
    assert read(tmp_path) == ["prose"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.pdf", "pdftotext"),
        ("a.PDF", "pdftotext"),
        ("a.docx", "pandoc"),
        ("a.html", "markup"),
        ("a.html.gz", "markup"),
        ("a.zip", "Unpack it"),
        ("a.tar.gz", "Unpack it"),
        ("a.xlsx", ".csv"),
        ("a.ipynb", "nbconvert"),
        ("a.bin", "a.txt"),
        ("model.safetensors", "model.txt"),
        ("corpus", "corpus.txt"),
        ("corpus.gz", "corpus.txt"),
    ],
)
def test_what_is_not_recognised_is_refused(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"perhaps text")
    for source in (tmp_path / name, f"{tmp_path}/*"):
        with pytest.raises(DataError, match=f"{name} is not read as text") as caught:
            read(source)
        assert caught.value.hint
        assert hint in caught.value.hint
        assert "*.jsonl" in caught.value.hint
    (tmp_path / "b.txt").write_text("prose")
    assert read(tmp_path) == ["prose"]


def test_one_of_several_parts_may_not_be_missing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b, c.txt").write_text("two")
    assert read(f"{tmp_path}/a.txt, {tmp_path}/*c.txt".replace("*c", "?, c".replace(",", "?")))
    with pytest.raises(DataError, match=r"no file matches '.*/no\.txt' of --data"):
        read(f"{tmp_path}/a.txt,{tmp_path}/no.txt")
    assert read(tmp_path / "b, c.txt") == ["two"]


def clone(folder: Path, *, prose: bool = False) -> Path:
    """A dataset repository as `git clone` brings it."""
    (folder / "data").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "notes.txt").write_text("hidden")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    (folder / "LICENSE").write_text("Do as you like")
    (folder / "LICENSE.txt").write_text("Do as you like")
    (folder / "dataset_infos.json").write_text('{"default": {}}')
    for split in ("train", "test", "validation"):
        for part in range(2):
            if prose:
                (folder / "data" / f"{split}-{part}.txt").write_text(f"{split} {part}")
            else:
                name = f"{split}-0000{part}-of-00002.parquet"
                (folder / "data" / name).write_bytes(parquet([f"{split} {part}"]))
    return folder


@pytest.mark.parametrize("prose", [False, True])
def test_of_a_cloned_dataset_the_training_split_is_read(prose: bool, tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone", prose=prose)
    assert read(folder) == read(folder / "data") == ["train 0", "train 1"]
    assert read(folder, split="test") == ["test 0", "test 1"]
    assert read(folder, split="dev") == ["validation 0", "validation 1"]
    names = left_out(folder)
    assert {"README.md", "LICENSE.txt"} <= names
    assert sum("test" in name or "validation" in name for name in names) == 4
    assert not left_out(f"{folder}/data/train*")
    assert read(f"{folder}/data/test*") == ["test 0", "test 1"]
    with pytest.raises(DataError, match="no split 'extra', it holds test, train, validation"):
        read(folder, split="extra")


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl", "dev.jsonl"),
        ("train/a.jsonl", "test/a.jsonl", "val/a.jsonl"),
        ("en-train.jsonl", "en-test.jsonl", "en-valid.jsonl"),
        ("default/train/0000.jsonl", "default/test/0000.jsonl", "default/validation/0.jsonl"),
        ("training.jsonl", "testing.jsonl", "evaluation.jsonl"),
        ("books.jsonl", "test.jsonl", "books-eval.jsonl"),
        ("a/train.jsonl", "a/test.jsonl", "b/test_train.d/eval.jsonl"),
    ],
)
def test_splits_by_the_names_of_files_and_folders(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines([name]))
    assert read(tmp_path) == [names[0]]
    assert len(left_out(tmp_path)) >= 1


def test_a_folder_of_a_test_split_alone_is_no_training_text(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(lines())
    with pytest.raises(DataError, match="holds no split 'train', it holds test") as caught:
        read(tmp_path)
    assert caught.value.hint and "--set data.split=test" in caught.value.hint
    assert read(tmp_path / "test.jsonl") == TEXTS


def test_prose_keeps_its_names(tmp_path: Path) -> None:
    for name in ("training.md", "unit-test.txt", "readme.txt", "README.md", "latest.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "COPYING.txt").write_text("terms")
    found = read(tmp_path)
    assert "unit-test.txt" in found
    assert "latest.txt" in found
    assert "terms" not in found
    other = tmp_path / "other"
    other.mkdir()
    for name in ("test.txt", "essay.txt", "README.md"):
        (other / name).write_text(name)
    assert read(other) == ["README.md", "essay.txt", "test.txt"] or read(other) == [
        "essay.txt",
        "test.txt",
    ]


def test_a_pattern_takes_no_card_in_by_accident(tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    (folder / "LICENSE").unlink()
    (folder / "dataset_infos.json").unlink()
    assert "# A data set" not in "".join(read(f"{folder}/**/*.*"))
    assert read(f"{folder}/README.md") == ["---\nlicense: mit\n---\n# A data set\n"]
    assert read(f"{folder}/*.md") == ["---\nlicense: mit\n---\n# A data set\n"]
    assert sorted(read(f"{folder}/data/*")) == sorted(
        f"{split} {part}" for split in ("train", "test", "validation") for part in range(2)
    )


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    texts = [f"text {n}" for n in range(200)]
    saved = datasets.Dataset.from_dict({"text": texts})
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert read(tmp_path / "one") == texts
    for start in (1, 64, 199, 200):
        assert read(tmp_path / "one", start=start) == texts[start:]
    both = datasets.DatasetDict(
        {"train": saved, "test": datasets.Dataset.from_dict({"text": ["held"]})}
    )
    both.save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both") == texts
    assert read(tmp_path / "both", split="test") == ["held"]
    assert left_out(tmp_path / "both") == {"test"}
    (tmp_path / "one" / "data-00000-of-00003.arrow").write_bytes(b"broken")
    with pytest.raises(DataError, match="one cannot be read as what save_to_disk writes"):
        read(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,text\n1,a\n2,b,c\n", r"row 2 \(line 3\) has 3 fields, expected 2: id, text"),
        ("a.csv", b"text,text\n1,a\n", "names a column twice"),
        ("a.csv", b'text\n"a\n', "cannot be read as csv"),
        ("a.csv", b"id,body\n1,a\n", r"row 1 has no column 'text', it has \['body', 'id'\]"),
        ("a.json", b'"text"', "is a JSON str, expected a list of rows"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2 is a JSON int, expected an object"),
        ("a.json", b"[" * 100_000, "a.json cannot be read as json"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "line 2 is not JSON"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "line 1 holds '.ud83d' in text, half of a surrogate"),
        ("a.json", b'[{"text": "\\udc00"}]', "row 1 holds '.udc00' in text, half of a surrogate"),
        ("a.txt", b"\xff\xfea", "is not UTF-8 text|cannot be read as text"),
        ("a.arrow", b"no arrow", "a.arrow cannot be read as arrow"),
        ("a.txt.xz", b"no xz", "a.txt.xz cannot be read as text"),
        ("a.txt.bz2", b"no bz2", "a.txt.bz2 cannot be read as text"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-9], "a.jsonl.gz cannot be read as jsonl"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x", "Git LFS pointer"),
    ],
)
def test_what_cannot_be_read_says_why(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            read(source)
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.jsonl", gzip.compress(lines(), mtime=0), "Rename it to a.jsonl.gz"),
        ("a.txt", bz2.compress(b"text"), "Rename it to a.txt.bz2"),
        ("a.csv", lzma.compress(b"text" * 99), "Rename it to a.csv.xz"),
        ("a.jsonl", parquet(), "Rename it to a.parquet"),
        ("a.jsonl.gz", lines(), "rename it without .gz"),
        ("a.jsonl.bz2", lines(), "rename it without .bz2"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-9], "damaged or was cut short"),
        ("a.jsonl.xz", lzma.compress(lines() * 99)[:-9], "damaged or was cut short"),
        ("a.parquet", parquet()[:-9], "damaged or was cut short"),
        ("a.csv", b'text\n"a\n', "Close its quotes"),
        ("a.json", b'[{"text": "a"},', "Correct it there"),
        ("a.jsonl", b'[{"text": "a"}]', "name it .json"),
        ("a.txt", b"a\0b", "Give *.txt"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(
    name: str, content: bytes, hint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert hint in str(caught.value.hint)
    assert ("Give *.txt" in str(caught.value.hint)) == (hint == "Give *.txt")


def test_lines_and_files_meet_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_rows, "LINE_AT_MOST", 1 << 20)
    monkeypatch.setattr(file_rows, "JSON_AT_MOST", 1 << 20)
    long = json.dumps({"text": "a" * (1 << 20)})
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n' + long)
    with pytest.raises(DataError, match=r"a.jsonl line 2 is longer than 1 million characters"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(f"[{long}]")
    with pytest.raises(DataError, match=r"a\.json is larger than .* JSON is read as a whole"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(f"[{long}]".encode()))
    with pytest.raises(DataError, match=r"a.json.gz is larger than"):
        read(tmp_path / "a.json.gz")
    (tmp_path / "a.csv").write_text("text\n" + "a" * (1 << 21))
    with pytest.raises(DataError, match=r"a\.csv line 2 is longer than"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.txt.gz"]
)
def test_a_file_of_100_gigabytes_of_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_rows, "LINE_AT_MOST", 1 << 22)
    with (tmp_path / name).open("wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "pipe"])
def test_a_pipe_or_a_device_is_no_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is a pipe, expected a file"):
        read(tmp_path / name)
    (tmp_path / "b.txt").write_text("text")
    assert read(tmp_path) == ["text"]
    with pytest.raises(DataError, match="is a device, expected a file"):
        read("/dev/null")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"broken.txt cannot be read \(No such file"):
        read(tmp_path / "broken.txt")


def test_a_text_without_lines_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_rows, "LARGE_TEXT", 1000)
    monkeypatch.setattr(file_rows, "PART_CHARACTERS", 300)
    (tmp_path / "a.txt").write_text("x" * 5000)
    found = read(tmp_path)
    assert "".join(found) == "x" * 5000
    assert max(map(len, found)) <= 600


def test_what_was_left_out_is_said(
    tmp_path: Path, source_cache: SourceFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    from dllm_convert.training.data.text import prepare_data

    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines([f"text {n} " * 9 for n in range(40)]))
    (folder / "test.jsonl").write_bytes(lines(["held out by whoever made it"]))
    (folder / "README.md").write_text("about it")
    recipe = Recipe.model_validate(
        {
            "source": "x",
            "target": "mdlm",
            "data": {"source": str(folder), "sequence_length": 32},
            "training": {"steps": 2, "batch_size": 2},
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(source_cache("llama"))
    data = prepare_data(recipe, tokenizer, Reporter())
    assert data.facts["left_out"] == ["README.md", "test.jsonl"]
    assert data.facts["documents"] + data.facts["held_out_documents"] == 40
    assert "left out of --data" in capsys.readouterr().err


PRETTY = json.dumps([{"text": text} for text in TEXTS], indent=2).encode()


@pytest.mark.parametrize(
    ("name", "content", "better"),
    [
        ("a.txt", lines(), "a.jsonl"),
        ("a.md", b"\n" + lines() + b"\n\n", "a.jsonl"),
        ("a.b.txt", lines(["one"]).rstrip(), r"a\.b\.jsonl"),
        ("A.TXT", b"\xef\xbb\xbf" + lines(["caf\u00e9"] * 1000), "A.jsonl"),
        ("a.txt.gz", gzip.compress(lines(), mtime=0), r"a\.jsonl\.gz"),
        ("a.txt", rows(), r"a\.json;"),
        ("a.text", PRETTY, r"a\.json;"),
        ("a.txt", b'{\n "text": ["x"]\n}', r"a\.json;"),
        ("a.txt", lines(["x" * 100_000] * 2), "a.jsonl"),
    ],
)
def test_rows_in_a_file_of_prose_are_told(
    name: str, content: bytes, better: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=f"JSON, .*Rename it to {better}"):
            read(source)


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "one"}\nand prose about it',
        "[a link](https://example.org) and prose",
        "{\\bf bold} text",
        "[1, 2, 3]",
        "[]",
        "[" * 100_000,
        '{"a":' * 100_000,
        "{not json}\n{not json}",
        '"a text"\n"another"',
        "12\n13",
        "Prose.\n" + '{"text": "one"}\n' * 5,
    ],
)
def test_prose_with_braces_stays_prose(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


def test_json_is_learnt_where_the_name_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(lines())
    assert read(tmp_path / "a.log") == [lines().decode()]
