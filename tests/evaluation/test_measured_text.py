"""`evaluate --data`: all of a text, as many draws as were asked for, and never what was learnt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conversion import convert
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dllm_convert.adapters import get_adapter
from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import read_manifest, write_manifest
from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.objective import Objective
from dllm_convert.errors import DataError
from dllm_convert.evaluation.request import Request
from dllm_convert.evaluation.settings import Settings
from dllm_convert.evaluation.text import _trained_on, measure_text
from dllm_convert.modeling.loading import load_model
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.recipe.splits import sliced
from dllm_convert.recipe.texts import fields_of_text
from dllm_convert.training.data.text import prepare_data

QUIET = Reporter(quiet=True)


@pytest.fixture
def checkpoint(source_cache: Any, tmp_path: Path) -> Path:
    """A conversion whose manifest says that it was trained on `texts`."""
    folder, texts = tmp_path / "model", tmp_path / "texts"
    plan = convert(source_cache("llama"), folder, "bd3lm", block=4)
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"Text {number} of a list, and what follows. " * 6)
    recipe = plan.recipe.model_dump(mode="json")
    recipe["data"] |= {
        "source": str(texts), "held_out_fraction": 0.3, "held_out_sequences": 2,
    }  # fmt: skip
    recipe["training"]["method"] = "full"
    write_manifest(folder, {"recipe": recipe, "files": {}})
    return folder


def words(path: Path, tokenizer: Any) -> int:
    """Tokens of a document; this tokenizer has no mark of its end."""
    return len(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])


def test_all_of_another_text_is_scored(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        (other / f"{number}.txt").write_text(
            ("Another text, of which the number is " + f"{number}. ") * 3 + "End."
        )
    found = measure_text(Request(checkpoint, data=str(other)), QUIET)
    expected = sum(words(path, tokenizer) for path in other.iterdir())
    assert found["data"]["documents"] == 3 and not found["held_out"]
    # Of each document all but the first is predicted.
    assert found["nelbo"]["tokens"] == expected - 3
    again = measure_text(Request(checkpoint, data=str(other / "1.txt")), QUIET)
    assert again["data"]["documents"] == 1
    assert again["nelbo"]["stderr"] > 0, "one sequence has the error of its draws"


def test_draws_are_what_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Few words, and a large variance of the noise.")
    request = Request(checkpoint, data=str(tmp_path / "short.txt"))
    errors = []
    for draws in (4, 64):
        found = measure_text(replace(request, settings=Settings(draws=draws)), QUIET)
        assert found["draws"] == draws
        errors.append(found["nelbo"]["stderr"])
    assert errors[1] < errors[0]
    one = measure_text(replace(request, settings=Settings(draws=1)), QUIET)
    assert one["nelbo"]["stderr"] is None


def test_of_the_trained_text_only_what_was_held_out(checkpoint: Path) -> None:
    recipe = Recipe.model_validate(read_manifest(checkpoint)["recipe"])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = prepare_data(recipe, tokenizer, QUIET)
    found = measure_text(Request(checkpoint, data=recipe.data.source), QUIET)
    assert found["held_out"]
    assert found["data"]["documents"] == text.facts["held_out_documents"]
    # A run measures as many sequences as it was told; here it is all of them.
    assert found["data"]["rows"] > recipe.data.held_out_sequences
    every = recipe.data.model_copy(update={"held_out_sequences": 1000})
    rows = prepare_data(recipe.model_copy(update={"data": every}), tokenizer, QUIET).held_out
    model = load_model(checkpoint, get_adapter("llama"))
    bound = nelbo(model, rows, Objective.from_config(model.config), seed=0, draws=8)
    assert found["nelbo"]["tokens"] == bound.tokens
    # The same rows in another order, with other noise.
    apart = abs(found["nelbo"]["nats_per_token"] - bound.nats_per_token)
    assert apart < 4 * (found["nelbo"]["stderr"] + bound.stderr)


def test_of_a_mixture_too_and_of_each_of_its_texts(checkpoint: Path, tmp_path: Path) -> None:
    for name in "ab":
        lines = (json.dumps({"text": f"{name}{number} " * 20}) for number in range(60))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    line = f"{tmp_path}/a.jsonl:[:40]:1,{tmp_path}/b.jsonl:1"
    manifest = read_manifest(checkpoint)
    manifest["recipe"]["data"] |= fields_of_text(line)
    write_manifest(checkpoint, manifest)

    def documents(data: str) -> tuple[bool, int]:
        found = measure_text(Request(checkpoint, data=data), QUIET)
        return found["held_out"], found["data"]["documents"]

    both, first = documents(line), documents(f"{tmp_path}/a.jsonl")
    second = documents(f"{tmp_path}/b.jsonl:train")
    assert both[0] and first[0] and second[0]
    assert both[1] == first[1] + second[1] and first[1] < 40 and second[1] < 60
    # Other rows of a text are another text.
    assert documents(f"{tmp_path}/a.jsonl:[40:]") == (False, 20)
    with pytest.raises(DataError, match="is a mixture"):
        documents(f"{tmp_path}/a.jsonl:1,{tmp_path}/b.jsonl:2")


def test_one_long_document_is_held_out_in_part(checkpoint: Path, tmp_path: Path) -> None:
    """As a run cuts it."""
    only = tmp_path / "one.txt"
    only.write_text(" ".join(f"word {number}" for number in range(400)))
    manifest = read_manifest(checkpoint)
    manifest["recipe"]["data"]["source"] = str(only)
    write_manifest(checkpoint, manifest)
    recipe = Recipe.model_validate(manifest["recipe"])
    text = prepare_data(recipe, AutoTokenizer.from_pretrained(checkpoint), QUIET)
    found = measure_text(Request(checkpoint, data=str(only)), QUIET)
    assert found["nelbo"]["tokens"] >= text.facts["held_out_tokens"] > 0
    assert found["nelbo"]["tokens"] < 0.5 * sum(
        measure_text(Request(checkpoint, data=str(path)), QUIET)["nelbo"]["tokens"]
        for path in (_copy(only, tmp_path / "copy.txt"),)
    )


def _copy(path: Path, to: Path) -> Path:
    to.write_bytes(path.read_bytes())
    return to


def test_a_text_of_which_all_was_trained_on_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    manifest = read_manifest(checkpoint)
    source = manifest["recipe"]["data"]["source"]
    manifest["recipe"]["data"]["held_out_source"] = "pydoc"
    write_manifest(checkpoint, manifest)
    with pytest.raises(DataError, match=r"all of --data .* was trained on"):
        measure_text(Request(checkpoint, data=source), QUIET)


def test_what_is_printed_says_which_documents(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Few words, and a large variance of the noise.")
    line = ["evaluate", str(checkpoint), "--data", str(tmp_path / "short.txt"), "--set", "draws=3"]
    result = CliRunner().invoke(app, line)
    assert "all of" in result.stderr + result.output, result.output
    text = read_manifest(checkpoint)["evaluation"]["text"]
    assert text["draws"] == 3 and str(tmp_path) not in json.dumps(text)


def test_another_text_may_have_another_column(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prose": f"Text {number} of a list, and what follows. " * 5} for number in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    line = ["evaluate", str(checkpoint), "--data", str(file), "--set", "draws=1", "--json"]
    refused = CliRunner().invoke(app, line)
    assert (refused.exit_code, "data.text_field=COLUMN" in refused.stderr) == (1, True)
    result = CliRunner().invoke(app, [*line, "--set", "data.text_field=prose"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["text"]["data"]["documents"] == 20
    idle = ["evaluate", str(checkpoint), "--tasks", "a", "--set", "data.text_field=prose"]
    assert CliRunner().invoke(app, idle).exit_code == 2


def test_a_part_of_what_was_trained_on_is_refused(tmp_path: Path) -> None:
    data = Data(source=str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="is a part of what was trained on") as caught:
        _trained_on(f"{data.source}:[:1000]", data)
    assert caught.value.hint and data.source in caught.value.hint
    assert _trained_on(str(tmp_path / "b.jsonl:[:10]"), data) is None
    sliced = Data(source=data.source, split="train[:50%]")
    assert _trained_on(f"{data.source}:train[:50%]", sliced) is not None
    assert _trained_on(f"{data.source}:train[50%:]", sliced) is None
    for part in ("train[40%:]", "train[:10%]", "train"):
        with pytest.raises(DataError, match=r"holds some of train\[:50%\], which was") as caught:
            _trained_on(f"{data.source}:{part}", sliced)
        assert f"{data.source}:train[:50%] measures" in str(caught.value.hint)
    with pytest.raises(DataError, match="depends on the number of rows"):
        _trained_on(f"{data.source}:train[:100]", sliced)


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ("a[:10]", "a[10:]", False),
        ("a[:10]", "a[9:]", True),
        ("a[5:10]", "a[:5]", False),
        ("a[5:10]", "a[:6]", True),
        ("a[:90%]", "a[90%:]", False),
        ("a[:90%]", "a[50%:60%]", True),
        ("a[:90%]", "a[5:]", None),
        ("a[90%:]", "a[:5]", None),
        ("a[:]", "a[5:]", True),
        ("a[:]", "a[10%:500]", True),
        ("a[0%:]", "a[5:]", True),
    ],
)
def test_slices_that_overlap(one: str, other: str, common: bool | None) -> None:
    left, right = sliced(one)[1], sliced(other)[1]
    assert left is not None and right is not None
    assert left.overlaps(right) is common and right.overlaps(left) is common
