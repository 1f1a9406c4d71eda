"""Datasets of the Hub, from a loopback server with the real client in its own process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SourceFactory
from hub_server import COMMIT, LoopbackHub, run_python, serve

READ = """
import json, sys
from dllm_convert.errors import DllmConvertError
from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.documents import open_corpus
from dllm_convert.training.data.content import find_documents
data = Data(**json.loads(sys.argv[1]))
start = int(sys.argv[2])
try:
    corpus = open_corpus(data)
    texts = [
        document.content
        for shard in corpus.shards
        for row in shard.read(start)
        for document in find_documents(row, data, shard.name)
    ]
    print(json.dumps([corpus.kind, corpus.revision, len(corpus.shards), texts]))
except DllmConvertError as error:
    print(json.dumps([type(error).__name__, error.message, error.hint]))
"""

PREPARE = """
import json, sys
from pathlib import Path
from itertools import islice
from transformers import AutoTokenizer
from dllm_convert.common.console import Reporter
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.data.text import prepare_data
recipe = Recipe.model_validate_json(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
data = prepare_data(recipe, tokenizer, Reporter(quiet=True), Path(sys.argv[3]))
start, count = int(sys.argv[4]), int(sys.argv[5])
rows = data.training_rows(start=start, total=start + count)
taken = islice(iter(rows), count) if data.streaming else [rows[start + i] for i in range(count)]
print(json.dumps([data.facts, [row["input_ids"].tolist() for row in taken]]))
"""


def ask(code: str, *arguments: str, env: dict[str, str], forked: bool = True) -> Any:
    modules = forks.PACKAGE if forked else ()
    return json.loads(run_python(code, *arguments, env=env, modules=modules).splitlines()[-1])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """Four parquet files of texts, a validation split, and a dataset with two subsets."""
    folder = tmp_path / "texts/data"
    folder.mkdir(parents=True)
    for part in range(4):
        texts = [f"n{n}n " * (4 + n % 17) for n in range(part, 80, 4)]
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pq.write_table(table, folder / f"train-{part:05}-of-00004.parquet", row_group_size=7)
    pq.write_table(
        pa.table({"id": [1, 2], "text": ["v1v " * 30, "n4n " * 8]}),
        folder / "validation-00000-of-00001.parquet",
    )
    chats = tmp_path / "chats"
    chats.mkdir()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (chats / "one.jsonl").write_text(json.dumps({"messages": turns, "text_id": 1}))
    (chats / "two.jsonl").write_text(json.dumps({"messages": turns[::-1] + turns, "text_id": 2}))
    (chats / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n"
        "- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    server = LoopbackHub(tmp_path / "hub")
    server.repos |= {"someone/texts": tmp_path / "texts", "someone/chats": chats}
    with serve(server):
        yield server


@pytest.fixture
def environment(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    return {**hub.environment(tmp_path / "home"), **paths}


def read(environment: dict[str, str], start: int = 0, *, forked: bool = True, **data: Any) -> Any:
    return ask(READ, json.dumps(data), str(start), env=environment, forked=forked)


def test_a_dataset_is_read_at_a_pinned_commit(environment: dict[str, str]) -> None:
    kind, revision, shards, texts = read(environment, source="someone/texts")
    assert (kind, revision, shards) == ("hub", COMMIT, 4)
    assert sorted(texts) == sorted(f"n{n}n " * (4 + n % 17) for n in range(80))
    _, _, _, rest = read(environment, start=13, source="someone/texts")
    assert rest == [text for part in range(4) for text in texts[part * 20 + 13 : part * 20 + 20]]


def test_subsets_and_conversations(environment: dict[str, str]) -> None:
    name, message, hint = read(environment, source="someone/chats")
    assert name == "HubError" and "one" in message and "data.subset" in hint
    _, _, _, texts = read(environment, source="someone/chats", subset="one")
    assert [[turn["content"] for turn in messages] for messages in texts] == [["q", "a"]]


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"source": "someone/else"}, "someone/else", "--data 'texts/*.txt'"),
        ({"source": "someone/texts", "split": "tset"}, "tset", "data.split"),
        ({"source": "someone/texts", "revision": "v9"}, "v9", "commit"),
        ({"source": "someone/texts", "subset": "none"}, "none", "data.subset"),
    ],
)
def test_what_is_not_there(
    data: dict[str, str], message: str, hint: str, environment: dict[str, str]
) -> None:
    name, found, advice = read(environment, **data)
    assert name == "HubError"
    assert message in found and hint in advice


def test_a_wrong_column_is_named_with_the_others(environment: dict[str, str]) -> None:
    name, message, hint = read(environment, source="someone/texts", text_field="body")
    assert name == "DataError"
    assert "no column 'body', it has ['id', 'text']" in message and "data.text_field" in hint


def test_a_server_that_goes_away(environment: dict[str, str], hub: LoopbackHub) -> None:
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    name, message, _ = read(environment, forked=False, source="someone/texts")
    assert name == "HubError" and "someone/texts" in message


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_training_goes_on_at_the_commit_it_began_with(
    streaming: str,
    environment: dict[str, str],
    hub: LoopbackHub,
    tmp_path: Path,
    source_cache: SourceFactory,
) -> None:
    recipe = json.dumps(
        {
            "source": "x",
            "target": "bd3lm",
            "block_size": 4,
            "data": {
                "source": "someone/texts",
                "sequence_length": 32,
                "streaming": streaming,
                "held_out_split": "validation",
            },
            "training": {"steps": 5, "batch_size": 2},
        }
    )

    def rows(folder: str, start: int, count: int) -> Any:
        arguments = [recipe, str(source_cache("llama")), str(tmp_path / folder)]
        return ask(PREPARE, *arguments, str(start), str(count), env=environment)

    facts, whole = rows("whole", 0, 60)
    assert (facts["kind"], facts["revision"]) == ("hub", COMMIT)
    assert facts["held_out"] == {
        "source": "someone/texts",
        "kind": "hub",
        "revision": COMMIT,
        "subset": None,
        "split": "validation",
    }
    rows("parts", 0, 20)
    _, rest = rows("parts", 20, 40)
    assert rest == whole[20:]
    if streaming == "off":
        asked = len(hub.requests)
        rows("parts", 20, 40)
        assert len(hub.requests) == asked
