"""Columns of a conversation by names of their own, and what is refused of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.errors import DataError
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Columns, Data
from dllm_convert.training.data.content import find_documents
from dllm_convert.training.data.look import look_at

ROW = {"frage": "Was?", "antwort": "Das.", "kontext": "Hier.", "messages": "not these", "text": ""}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def turns(row: Any, **columns: str) -> Any:
    documents = list(find_documents(row, Data(columns=Columns(**columns)), "row 1"))
    assert len(documents) <= 1
    return [(turn["role"], turn["content"]) for turn in documents[0].content] if documents else None


def test_named_columns_are_the_conversation_and_nothing_else_is() -> None:
    found = turns(ROW, prompt="frage", completion="antwort")
    assert found == [("user", "Was?"), ("assistant", "Das.")]
    found = turns(ROW, instruction="frage", output="antwort", input="kontext")
    assert found == [("user", "Was?\nHier."), ("assistant", "Das.")]
    found = turns(ROW, prompt="frage", completion="antwort", system="kontext")
    assert found[0] == ("system", "Hier.")
    # The other way round too: names that mean something here may be another's.
    swapped = {"prompt": "Das.", "completion": "Was?"}
    found = turns(swapped, prompt="completion", completion="prompt")
    assert found == [("user", "Was?"), ("assistant", "Das.")]
    assert turns({"frage": None, "antwort": None}, prompt="frage", completion="antwort") is None


def test_a_named_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1 has no column 'anwort' \(data.columns.completion"):
        turns(ROW, prompt="frage", completion="anwort")
    # What stands beside question and answer may be missing in a row.
    assert turns(ROW, prompt="frage", completion="antwort", tools="werkzeug") is not None


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "a"},
        {"output": "a"},
        {"system": "a"},
        {"prompt": "a", "output": "b"},
        {"prompt": "a", "completion": "b", "output": "c"},
        {"prompt": "a", "completion": "b", "input": "c"},
    ],
)
def test_half_a_pair_is_refused_by_the_recipe(columns: dict[str, str]) -> None:
    overrides = {f"data.columns.{part}": name for part, name in columns.items()}
    with pytest.raises(dc.DllmConvertError, match=r"data\.columns") as caught:
        load_recipe("smollm2-135m", overrides=overrides)
    assert caught.value.hint


def test_a_table_is_learnt_by_its_own_names(tmp_path: Path) -> None:
    path = tmp_path / "fragen.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["frage", "antwort"])
        writer.writeheader()
        writer.writerows({"frage": f"Was ist {n}?", "antwort": f"Die Zahl {n}."} for n in range(9))
    found = look_at(Data(source=str(path), columns=Columns(prompt="frage", completion="antwort")))
    assert (found.documents, found.chats) == (9, 9)


def test_what_is_not_recognised_says_what_to_type(tmp_path: Path, source_cache: Any) -> None:
    path = tmp_path / "fragen.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"The number {n}."} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ("check", str(source_cache("llama")), "--data", str(path), "--steps", "1")
    refused = invoke(*given)
    assert refused.exit_code
    typed = [
        word
        for word in " ".join(refused.output.split()).replace(";", " ").split()
        if word.startswith("data.columns.")
    ]
    assert typed == ["data.columns.prompt=question", "data.columns.completion=answer"]
    allowed = invoke(*given, *(part for word in typed for part in ("--set", word)), "--json")
    assert allowed.exit_code == 0, allowed.output
    assert json.loads(allowed.stdout)["text"]["chats"] == 40
