"""The text is part of the plan: looked at before anything is written, and not read to death."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SourceFactory
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import read_manifest
from dllm_convert.pipeline.text import plan_text
from dllm_convert.planning.conversion import make_plan
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.budget import MOST_EPOCHS
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.data import look
from dllm_convert.training.data.look import look_at
from dllm_convert.training.data.text import prepare_data
from dllm_convert.training.run import _within_text

QUIET = Reporter(quiet=True)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def said(result: Any) -> str:
    return " ".join((result.output + result.stderr).split())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"Text {number} of a list, and what follows. " * 9)
    return folder


@dataclass(frozen=True)
class Plan:
    """As much of a plan as says how long it trains."""

    recipe: Recipe


def recipe(source: Path, texts: str, **fields: Any) -> Recipe:
    data = {"source": texts, "sequence_length": 64, **fields.pop("data", {})}
    training = {"steps": 4, "batch_size": 2, **fields.pop("training", {})}
    known = {"source": str(source), "target": "mdlm", "data": data, "training": training, **fields}
    return Recipe.model_validate(known)


def test_tokens_and_epochs_are_those_of_the_training(
    source_cache: SourceFactory, texts: Path
) -> None:
    source = source_cache("llama")
    asked = recipe(source, str(texts))
    planned = plan_text(
        make_plan(asked, inspect_source(str(source)), launch=Launch(2, strategy="ddp"))
    )
    assert planned is not None
    prepared = prepare_data(asked, AutoTokenizer.from_pretrained(source), QUIET)
    found = prepared.facts["train_tokens"]
    assert planned.look.whole and planned.look.documents == 12 and planned.look.chats == 0
    assert planned.wanted == 2 * asked.training_tokens == 2 * 4 * 2 * 64
    held_out = prepared.facts["held_out_documents"] / 12
    exact = planned.wanted / found
    assert planned.epochs == pytest.approx(exact * (1 - held_out) / 0.9, rel=0.05)
    # A limit of documents is a limit of the text.
    few = recipe(source, str(texts), data={"max_documents": 3})
    cut = plan_text(make_plan(few, inspect_source(str(source))))
    assert cut is not None and cut.look.documents == 3 and cut.look.whole


def test_a_part_tells_the_whole(
    source_cache: SourceFactory, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recipe(source_cache("llama"), str(texts)).data
    whole = look_at(data)
    monkeypatch.setattr(look, "MOST_CHARACTERS", 1000)
    part = look_at(data)
    assert not part.whole and part.documents < 12
    assert part.tokens == pytest.approx(whole.tokens, rel=0.05)
    monkeypatch.setattr(look, "MOST_DOCUMENTS", {"files": 2})
    assert look_at(data).documents == 2


def test_a_part_of_each_long_document_is_counted(tmp_path: Path) -> None:
    counted: list[str] = []

    def count(texts: Sequence[str]) -> list[int]:
        counted.extend(texts)
        return [len(text.split()) for text in texts]

    file = tmp_path / "long.jsonl"
    long, other = "five words of five letters. " * 20_000, "of two " * 30_000
    file.write_text("\n".join(json.dumps({"text": text}) for text in (long, other)))
    found = look_at(Data(source=str(file)), count)
    most = look._COUNTED_CHARACTERS
    assert [len(text) for text in counted] == [most // 2, most // 2]
    # Each document has its share, so the rate lies between theirs; sizes are those of all of it.
    sizes = [len(long), len(other)]
    rate = sum(len(text.split()) for text in counted) / most
    assert 5 / 28 < rate < 2 / 7
    assert found.tokens == sum(round(size * rate) for size in sizes)
    # What is as long as is counted is counted to its end.
    counted.clear()
    file.write_text(json.dumps({"text": other[:most]}))
    exact = look_at(Data(source=str(file)), count)
    assert counted == [other[:most]] and exact.tokens == len(other[:most].split())


CHATS = [
    {"instruction": "Name a bird.", "input": "", "output": "A wren."},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"text": "Only text."},
]


def test_kinds_of_documents_are_told_apart(tmp_path: Path, source_cache: SourceFactory) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in CHATS * 3))
    source = source_cache("llama", chat=True)
    planned = plan_text(
        make_plan(recipe(source, str(file), data={"allow_epochs": True}),
                  inspect_source(str(source)))
    )  # fmt: skip
    assert planned is not None
    assert (planned.look.documents, planned.look.chats) == (9, 6)
    assert "9 documents, 6 of them chats" in planned.line()


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_text_is_not_read_to_death(
    command: str, source_cache: SourceFactory, texts: Path, tmp_path: Path
) -> None:
    line = [command, str(source_cache("llama")), "--to", "mdlm", "--data", str(texts),
            "--set", "data.sequence_length=64", "--steps", "500"]  # fmt: skip
    out = tmp_path / "out"
    result = invoke(*line, "--out", str(out))
    assert result.exit_code == 3
    text = said(result)
    assert f"more than {MOST_EPOCHS} times" in text and "--allow-epochs" in text
    assert not out.exists(), "something was written before"
    # The number of steps that it names is one that is taken.
    fewer = text.split("or --steps ")[1].split(",")[0]
    assert invoke("check", *line[1:-1], fewer).exit_code == 0
    assert invoke("check", *line[1:], "--allow-epochs").exit_code == 0
    timed = invoke("check", *line[1:], "--max-time", "2m")
    assert timed.exit_code == 0, "time ends it before, or the text"
    assert f"if there is time; it ends after {MOST_EPOCHS} times" in " ".join(timed.stdout.split())


def test_a_time_limit_does_not_read_a_text_to_death(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    """As many steps as read all of it so often, and the rates end with them; 1,000 steps else."""
    (tmp_path / "short.txt").write_text("A list holds objects in their order. " * 40)
    line = ["run", str(source_cache("llama")), "--to", "mdlm", "--full", "--verify", "files"]
    line += ["--data", str(tmp_path / "short.txt"), "--max-time", "10m", "--steps", "1000"]
    for field in (
        *("data.sequence_length=64", "data.held_out_fraction=0.5", "training.precision=fp32"),
        *("training.lr_schedule=linear", "training.batch_size=2", "training.log_steps=1"),
    ):
        line += ["--set", field]
    out = tmp_path / "out"
    result = invoke(*line, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    measured = read_manifest(out)["measurements"]
    told, tokens = measured["train"], measured["data"]["train_tokens"]
    assert told["stopped"] == "text"
    # Rows are filled up, and the last step is a whole one.
    assert (MOST_EPOCHS - 1) * tokens < told["tokens"] < (MOST_EPOCHS + 1) * (tokens + 64)
    assert f"all of the text is read {MOST_EPOCHS} times by then" in said(result)
    lines = [json.loads(text) for text in (out / ".work/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == told["steps"]
    assert told["steps"] < 1000 and lines[-1]["learning_rate"] < 0.1 * max(
        found["learning_rate"] for found in lines
    )


def test_scraps_are_refused_before_anything_is_written(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    """And where a folder was begun, with the text put right it is not in the way."""
    (tmp_path / "scrap.txt").write_text("A list of names.")
    (tmp_path / "text.txt").write_text("A list of names, and of what they are bound to. " * 60)
    line = ["run", str(source_cache("llama")), "--to", "bd3lm", "--block", "32", "--full"]
    line += ["--set", "data.sequence_length=64", "--set", "training.precision=fp32"]
    line += ["--steps", "2", "--verify", "files", "--out", str(tmp_path / "out")]
    refused = invoke(*line, "--data", str(tmp_path / "scrap.txt"))
    assert refused.exit_code == 1
    assert "expected at least 64: a block of 32 to train on and one to measure on" in said(refused)
    assert "or a smaller --block" in said(refused)
    assert not (tmp_path / "out").exists()
    # One that is long enough as a whole, of which too little is left to measure on.
    uneven = [*line, "--set", "data.held_out_fraction=0.01", "--allow-epochs"]
    failed = invoke(*uneven, "--data", str(tmp_path / "text.txt"))
    assert failed.exit_code == 1 and "fewer than one block" in said(failed)
    assert (tmp_path / "out").exists()
    mended = invoke(*line, "--allow-epochs", "--data", str(tmp_path / "text.txt"),
                    "--set", "data.held_out_fraction=0.3")  # fmt: skip
    assert mended.exit_code == 0, said(mended)


def test_prompts_and_filled_blocks_are_no_scraps(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    """What the base writes from a question is what is trained on; a filled block is one."""
    source = source_cache("llama", chat=True)
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    file.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(3)))
    line = ["check", str(source), "--to", "bd3lm", "--block", "64", "--data", str(file), "--full"]
    line += ["--set", "data.sequence_length=128", "--allow-epochs"]
    assert invoke(*line).exit_code == 0
    written = ["--set", "data.write_with_base.prompts=3", "--set", "data.fill_blocks=off"]
    assert invoke(*line, *written).exit_code == 0
    refused = invoke(*line, "--set", "data.fill_blocks=off")
    assert "expected at least 128" in said(refused)


def test_blocks_have_their_size_where_the_text_ends_a_training() -> None:
    growing = {"steps": 1000, "batch_size": 2, "max_minutes": 60.0, "block_growth": {"steps": 500}}
    fields = {"source": "x/y", "target": "bd3lm", "block_size": 8, "training": growing}
    plan: Any = Plan(Recipe.model_validate({**fields, "data": {"source": "pydoc"}}))
    for rows, steps, grown in ((10, 100, 50), (1, 10, 5), (0, 1, 0)):
        data: Any = SimpleNamespace(rows_in=lambda times, rows=rows: times * rows)
        fewer = _within_text(plan, data, QUIET).recipe.training
        assert (fewer.steps, fewer.block_growth.steps) == (steps, grown)


def test_no_number_of_steps_is_named_where_one_is_too_many(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("Three short words.")
    line = [
        "check",
        str(source_cache("llama")),
        "--to",
        "mdlm",
        "--data",
        str(tmp_path / "one.txt"),
    ]
    text = said(invoke(*line, "--set", "data.sequence_length=256", "--steps", "9", "--full"))
    assert f"more than {MOST_EPOCHS} times" in text and "with --data, or --allow-epochs" in text


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.txt", None, "no file matches"),
        ("rows.jsonl", '{"prose": "no column that is known"}\n', "has no column 'text'"),
        ("page.html", "<p>text</p>", "page.html"),
        ("empty.txt", "", "holds no text"),
        ("empty.jsonl", "", "holds no text"),
        ("head.csv", "text\n", "holds no text"),
        ("blank.txt", " \n\n \n", "holds no text"),
    ],
)
def test_what_is_no_text_is_found_out_first(
    command: str,
    name: str,
    content: str | None,
    expected: str,
    source_cache: SourceFactory,
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    out = tmp_path / "out"
    line = [command, str(source_cache("llama")), "--to", "mdlm", "--out", str(out)]
    result = invoke(*line, "--data", str(tmp_path / name))
    assert result.exit_code == 1, result.output
    assert expected in said(result)
    assert not out.exists()


def test_a_dataset_out_of_reach_is_said_and_the_rest_is_planned(
    source_cache: SourceFactory,
) -> None:
    """The Hub cannot be reached in tests; a plan of the model needs no text."""
    line = ["check", str(source_cache("llama")), "--to", "mdlm", "--data", "somebody/texts"]
    result = invoke(*line)
    assert result.exit_code == 0, result.output
    assert "not looked at" in said(result)
    document = json.loads(invoke(*line, "--json").stdout)
    assert "somebody/texts" in document["text"]["unread"]


def test_check_shows_it(source_cache: SourceFactory) -> None:
    line = ["check", str(source_cache("llama")), "--to", "bd3lm", "--block", "8"]
    result = invoke(*line, "--set", "data.sequence_length=64")
    assert "pydoc: " in said(result) and "all of it" in said(result)
    document = json.loads(invoke(*line, "--set", "data.sequence_length=64", "--json").stdout)
    assert document["text"]["kind"] == "pydoc" and document["text"]["epochs"] > 0
    assert "text" not in json.loads(invoke(*line, "--no-train", "--json").stdout)


def test_every_text_of_a_mixture_is_looked_at(source_cache: SourceFactory, texts: Path) -> None:
    source = source_cache("llama")
    fields = (
        "data.sequence_length=64",
        "training.batch_size=2",
        "training.gradient_accumulation=1",
    )
    line = ["check", str(source), "--to", "mdlm", *(w for f in fields for w in ("--set", f))]
    mixed = f"{texts}:3,pydoc:[:10]:1"
    result = invoke(*line, "--data", mixed, "--steps", "20", "--json")
    found = json.loads(result.stdout)["text"]
    assert found["kind"] == "mixture" and found["source"] == mixed
    first, second = found["texts"]
    assert (first["share"], second["share"]) == (0.75, 0.25)
    assert (first["documents"], second["documents"]) == (12, 10)
    assert first["wanted"] == 3 * second["wanted"] == 0.75 * 20 * 2 * 64
    assert first["epochs"] > second["epochs"]
    shown = said(invoke(*line, "--data", mixed, "--steps", "20"))
    assert "75.0%" in shown and "25.0% pydoc: 10 documents" in shown
    # Each text has to last: the other one's tokens do not help.
    refused = invoke(*line, "--data", mixed, "--steps", "2000")
    assert refused.exit_code == 3
    assert f"{texts}: 12 documents" in said(refused) and "--allow-epochs" in said(refused)
    fewer = said(refused).split("or --steps ")[1].split(",")[0]
    assert invoke(*line, "--data", mixed, "--steps", fewer).exit_code == 0
    missing = invoke(*line, "--data", f"{texts}:3,{texts}/none.txt:1")
    assert missing.exit_code == 1 and "none.txt" in said(missing)
