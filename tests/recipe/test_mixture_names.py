"""How a text is named: parts, slices, mixtures, and what can be read in two ways."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.errors import IncompatibleError, TypedFieldError
from dllm_convert.recipe.contradiction import UnsoundError
from dllm_convert.recipe.loading import amend_recipe, dump_recipe, load_recipe
from dllm_convert.recipe.splits import Rows, sliced
from dllm_convert.recipe.texts import fields_of_text


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("pydoc", {}),
        ("a/b", {}),
        ("x.txt,y.txt", {}),
        ("texts/{a,b}.txt", {}),
        (r"C:\texts\a.txt", {}),
        ("https://host/a.txt", {}),
        ("data:v2/*.txt", {}),
        ("a/b:test", {"source": "a/b", "split": "test"}),
        ("a/b:math/train", {"source": "a/b", "subset": "math", "split": "train"}),
        ("a/b:train[:10%]", {"source": "a/b", "split": "train[:10%]"}),
        ("pydoc:[5:20]", {"source": "pydoc", "split": "[5:20]"}),
    ],
)
def test_one_text(line: str, fields: dict[str, Any]) -> None:
    assert fields_of_text(line) == ({"source": line} | fields)


def test_a_mixture_has_a_weight_for_each() -> None:
    line = " a/b:math/train[:10%]:0.7, c/d:2 , 't':.25,e/f:train:1."
    found = fields_of_text(line)
    assert found["mixture"] == [
        {"source": "a/b", "weight": 0.7, "subset": "math", "split": "train[:10%]"},
        {"source": "c/d", "weight": 2.0},
        {"source": "'t'", "weight": 0.25},
        {"source": "e/f", "weight": 1.0, "split": "train"},
    ]
    assert found["source"] == "a/b:math/train[:10%]:0.7,c/d:2,'t':0.25,e/f:1"
    # The line says what it stands for.
    again = fields_of_text(found["source"])
    assert again["source"] == found["source"]


@pytest.mark.parametrize(
    ("line", "message", "typed"),
    [
        ("a/b:0.7", "weighs one text", "--data a/b"),
        ("a/b:1,c/d", "no weight for c/d", "c/d:0.5"),
        ("a/b:train,c/d:test", "no weights to mix them", "a/b:train:0.5,c/d:test:0.5"),
        ("pydoc[:10%]", "stands behind a colon", "pydoc:[:10%]"),
        ("a/b[5:9]:1,c/d:2", "stands behind a colon", "a/b:train[5:9]"),
        ("a/b:x/test[5:9],c/d", "no weights to mix them", "a/b:x/test[5:9]:0.5,c/d:0.5"),
    ],
)
def test_what_says_too_little_is_refused_with_what_to_type(
    line: str, message: str, typed: str
) -> None:
    with pytest.raises(UnsoundError) as caught:
        fields_of_text(line)
    assert message in caught.value.found.message and typed in caught.value.found.hint
    # What it says to type is taken.
    assert fields_of_text(typed.removeprefix("--data ")) if "," in typed else True


def test_a_path_with_a_colon_is_one_where_nothing_else_can_be_meant(tmp_path: Path) -> None:
    for name in ("run:2", "v:train"):
        (tmp_path / name).mkdir()
    (tmp_path / "v:train/a.txt").write_text("text")
    for line in ("run:2", "v:train", "v:train/a.txt", str(tmp_path / "run:2")):
        assert fields_of_text(line) == {"source": line}
    mixed = fields_of_text("run:2:0.5,v:train:0.5")["mixture"]
    assert [text["source"] for text in mixed] == ["run:2", "v:train"]
    for name in ("run", "v"):
        (tmp_path / name).mkdir()
    for line in ("run:2", "v:train", "v:train:0.5,pydoc:0.5"):
        with pytest.raises(UnsoundError) as caught:
            fields_of_text(line)
        assert "two ways" in caught.value.found.message
        assert "[:]" in caught.value.found.hint
    assert fields_of_text("v[:]train") == {"source": "v[:]train"}
    assert fields_of_text("./v[:]train:1,run[:]2:1")["mixture"][0]["source"] == "./v[:]train"


@pytest.mark.parametrize(
    ("split", "total", "rows"),
    [
        ("train[:10%]", 50, (0, 5)), ("train[10%:]", 55, (6, 55)), ("[20%:30%]", 10, (2, 3)),
        ("train[5:20]", 50, (5, 20)), ("train[5:20]", 8, (5, 8)), ("train[9:20]", 8, (8, 8)),
        ("train[:]", 8, (0, 8)), ("train[:5]", None, (0, 5)), ("train[5:]", None, (5, None)),
        ("train[33.3%:]", 1000, (333, 1000)),
    ],
)  # fmt: skip
def test_slices(split: str, total: int | None, rows: tuple[int, int | None]) -> None:
    name, found = sliced(split)
    assert name == "train" and isinstance(found, Rows) and found.of(total) == rows


def test_parts_that_meet_share_no_row_and_miss_none() -> None:
    chance = random.Random(0)
    for _ in range(300):
        total, cut = chance.randrange(1, 999), f"{chance.uniform(0, 100):.2f}%"
        first, second = (sliced(f"train[{part}]")[1] for part in (f":{cut}", f"{cut}:"))
        assert first and second and first.of(total)[1] == second.of(total)[0]


@pytest.mark.parametrize(
    "split",
    ["train[", "train[1]", "train[1:2:3]", "train[:x]", "train[:1.5]", "train[:101%]", "a]b[",
     "train[5:5]", "train[7:3]", "train[50%:20%]", "train[-5:]", "train[:1][:2]",
     f"train[:{'9' * 400}]", "train[2147483648:]"],
)  # fmt: skip
def test_what_is_no_slice_is_refused(split: str) -> None:
    with pytest.raises(ValueError):
        sliced(split)
    with pytest.raises(TypedFieldError if "[" not in split else IncompatibleError):
        load_recipe("x/y", overrides={"target": "mdlm", "data.split": split})


BOTH = {"target": "mdlm", "data.source": "a/b:0.7,c/d:x/test:0.1"}


def test_a_resolved_mixture_is_a_recipe_itself(tmp_path: Path) -> None:
    recipe = load_recipe("x/y", overrides=BOTH)
    assert recipe.data.source == "a/b:0.7,c/d:x/test:0.1"
    shares = [share for share, _ in recipe.data.texts]
    assert shares == [Fraction(7, 8), Fraction(1, 8)], "a tenth is a tenth"
    first, second = (data for _, data in recipe.data.texts)
    assert (first.source, first.subset, first.split) == ("a/b", None, "train")
    assert (second.source, second.subset, second.split) == ("c/d", "x", "test")
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(str(file), overrides={}).data == recipe.data
    assert amend_recipe(recipe, {"training.steps": 3}).data == recipe.data
    # Another text takes the place of all of it, and the other way round.
    other = amend_recipe(recipe, {"data.source": "e/f:test"}).data
    assert (other.source, other.split, other.mixture) == ("e/f", "test", ())
    one = load_recipe("x/y", overrides={"target": "mdlm", "data.source": "e/f:s/test"})
    back = amend_recipe(one, {"data.source": BOTH["data.source"]}).data
    assert back == recipe.data
    # The same text, said once more, keeps its parts.
    assert amend_recipe(recipe, {"data.source": recipe.data.source}).data == recipe.data


def test_a_list_in_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (
        "source: x/y\ntarget: mdlm\ndata:\n  text_field: body\n  mixture:\n"
        "    - {source: a/b, weight: 3, revision: v1, text_field: said, containing: python}\n"
        "    - {source: 'run:2', weight: 1, split: 'test[:5]'}\n"
    )
    file.write_text(text)
    data = load_recipe(str(file), overrides={}).data
    first, second = (data for _, data in data.texts)
    assert (first.revision, first.text_field, first.containing) == ("v1", "said", "python")
    assert (second.source, second.split, second.text_field) == ("run:2", "test[:5]", "body")
    assert second.containing is None and not second.mixture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.mixture": [{"source": "a/b"}]}, "weight of data.mixture[0] is missing"),
        ({"data.mixture": [{"source": "a/b", "weight": 0}]}, "data.mixture[0].weight is 0"),
        ({"data.mixture": [{"source": "a", "weight": 1, "wait": 2}]}, "unknown field wait"),
        ({"data.mixture": [{"source": "a/b", "weight": True}]}, "weight is true"),
        ({"data.mixture": "a/b:1"}, "data.mixture is"),
        ({"data.mixture": ["a/b"]}, "expected the fields source, weight"),
        ({"data.source": "a/b:1,a/b:2"}, "names a/b twice"),
        ({"data.source": "a/b:1,c/d:train[:x]:2"}, "no slice"),
        ({"data.source": "a/b:1,c/d:2", "data.subset": "s"}, "data.subset"),
        ({"data.source": "a/b:1,c/d:2", "data.held_out_split": "s"}, "data.held_out_split"),
        ({"data.source": "a/b:test", "data.split": "train"}, "data.source says test"),
        ({"data.source": "a/b:1"}, "weighs one text"),
        ({"data.source": "pydoc",
          "data.mixture": [{"source": "a/b", "weight": 1}]}, "data.mixture mixes a/b:1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_mixture_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        load_recipe("x/y", overrides={"target": "mdlm", **fields})
    assert message in caught.value.message, caught.value.message


@pytest.mark.parametrize("line", ["a/b:0.7", "a/b:1,c/d", "a:train,b:test"])
def test_a_line_that_was_typed_wrongly_ends_with_2(line: str) -> None:
    result = CliRunner().invoke(app, ["check", "x/y", "--to", "mdlm", "--data", line])
    assert result.exit_code == 2 and "--data" in result.stderr
    assert "Traceback" not in result.stderr
