"""Several processes: they share the rows of one, none twice, also after an interruption."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import SourceFactory
from transformers import AutoTokenizer

from dllm_convert.recipe.schema import Recipe

pytestmark = pytest.mark.slow
Rows = list[Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(
    folder: Path, tokenizer: Path, texts: Path | str, *, world: int, batch: int, steps: int = 9,
    resumed: int = 0, **fields: Any,
) -> list[list[Rows]]:  # fmt: skip
    """Return the rows that each process sees, by process and forward."""
    training = {"steps": steps, "batch_size": batch, **fields.pop("training", {})}
    recipe = Recipe.model_validate(
        {
            "source": "x",
            "target": "bd3lm",
            "block_size": 4,
            "data": {"source": str(texts), "sequence_length": 32, **fields},
            "training": training,
        }
    )
    out = folder / f"out-{world}-{batch}-{resumed}"
    out.mkdir(parents=True)
    names = [recipe.model_dump_json(), tokenizer, folder / f"data-{world}-{batch}", out, resumed]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} | address
        for rank in range(world)
    ]
    program = str(Path(__file__).with_name("rank_rows.py"))
    processes = [
        forks.start(
            [sys.executable, program, *map(str, names)],
            env={**os.environ, **(rank if world > 1 else {})},
        )
        for rank in ranks
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": f"n{n}n " * (4 + n % 17)}) for n in range(part, 40, 3)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return folder


def together(ranks: list[list[Rows]]) -> list[Rows]:
    """Rows of each forward over all processes, in the order of the processes."""
    return [[row for rank in step for row in rank] for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_two_processes_share_the_rows_of_a_mixture(
    streaming: str, tmp_path: Path, texts: Path, source_cache: SourceFactory
) -> None:
    tokenizer, other = source_cache("llama"), tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"o{n}o " * (4 + n % 7)}) for n in range(30)))
    mixture = [{"source": str(texts), "weight": 3.0}, {"source": str(other), "weight": 1.0}]
    fields: dict[str, Any] = {"streaming": streaming, "mixture": mixture}
    line = f"{texts}:3,{other}:1"
    (one,) = run(tmp_path, tokenizer, line, world=1, batch=4, **fields)
    two = run(tmp_path, tokenizer, line, world=2, batch=2, **fields)
    assert together(two) == one
    resumed = run(tmp_path, tokenizer, line, world=2, batch=2, resumed=4, **fields)
    assert together(resumed) == one[4:]
    # Of the four rows of a step one is of the second text.
    vocabulary = AutoTokenizer.from_pretrained(tokenizer)
    for step in together(two):
        said = [vocabulary.decode(row[0]) for row in step]
        assert sum("o" in text for text in said) == 1


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_two_processes_share_the_rows_of_one(
    streaming: str, tmp_path: Path, texts: Path, source_cache: SourceFactory
) -> None:
    tokenizer = source_cache("llama")
    (one,) = run(tmp_path, tokenizer, texts, world=1, batch=4, streaming=streaming)
    two = run(tmp_path, tokenizer, texts, world=2, batch=2, streaming=streaming)
    assert together(two) == one
    resumed = run(tmp_path, tokenizer, texts, world=2, batch=2, streaming=streaming, resumed=4)
    assert together(resumed) == one[4:]


def test_epochs_join_inside_a_batch_and_nothing_is_repeated(
    tmp_path: Path, texts: Path, source_cache: SourceFactory
) -> None:
    # Accumulated forwards: one process twice is two processes once.
    fields: dict[str, Any] = {"steps": 30, "streaming": "off"}
    tokenizer = source_cache("llama")
    accumulated = {"training": {"gradient_accumulation": 2}}
    (one,) = run(tmp_path, tokenizer, texts, world=1, batch=3, **fields, **accumulated)
    two = run(tmp_path, tokenizer, texts, world=2, batch=3, **fields)
    flat = [row for forward in one for row in forward]
    assert [row for step in together(two) for row in step] == flat
    facts = json.loads((tmp_path / "data-1-3/text/facts.json").read_text())
    assert facts["read"] == 40
    distinct = {json.dumps(row) for row in flat}
    epoch = len(distinct)
    assert epoch % 6
    for start in range(0, len(flat) - epoch, epoch):
        assert {json.dumps(row) for row in flat[start : start + epoch]} == distinct
