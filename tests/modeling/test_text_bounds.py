"""One definition of where a text begins and ends, and every part that asks it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds_cases import BEGIN, END, TEMPLATES, TURN, WRAPPED, wrapped_source
from conversion import convert
from factory import TOKENIZERS
from transformers import AutoTokenizer

from dllm_convert.adapters import get_adapter
from dllm_convert.errors import IncompatibleError
from dllm_convert.evaluation.subject import EvaluatedCheckpoint
from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.modeling.text_bounds import bounds_of, end_token, leave_open, open_ids
from dllm_convert.planning.conversion import make_plan
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.sampling.prompts import encode_prompt
from dllm_convert.source.chat_turns import read_template, turn_end
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.data.content import Document
from dllm_convert.training.data.encoding import Encoder

TEXT = "The value of a name"


def target_of(name: str) -> str:
    return "mdlm" if name in ("as bert", "as roberta") else "bd3lm"


def ends_of(folder: Path) -> tuple[int, ...]:
    return read_ids(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])


@pytest.mark.parametrize("name", list(WRAPPED))
def test_every_part_means_the_same_ends(tmp_path: Path, name: str) -> None:
    source = wrapped_source(tmp_path / "source", name)
    plan = convert(source, tmp_path / "out", target_of(name))
    convert(source, tmp_path / "light", target_of(name), light=True)
    written = [
        (tmp_path / name / "generation_config.json").read_text() for name in ("out", "light")
    ]
    assert written[0] == written[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    bounds = bounds_of(tokenizer)
    plain = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer(TEXT).input_ids == [*bounds.begin, *plain, *bounds.closing]
    # Training: begun as the tokenizer does, ended once, by a token that ends decoding.
    (document,) = Encoder(tokenizer, Data()).encode([Document(TEXT, "here")])
    learnt = document.ids.tolist()
    assert learnt[: len(bounds.begin) + len(plain)] == [*bounds.begin, *plain]
    ends = ends_of(tmp_path / "out")
    assert learnt[-1] == end_token(tokenizer)
    assert learnt[-1] in ends
    assert learnt[len(bounds.begin) + len(plain)] in ends, "the first token behind it ends it"
    # Prompts: begun once, left open; with the beginning typed, too.
    asked = [*bounds.begin, *plain]
    assert encode_prompt(tokenizer, TEXT) == asked
    assert open_ids(tokenizer, tokenizer.decode(bounds.begin) + TEXT) == asked
    subject = EvaluatedCheckpoint.load(tmp_path / "out")
    assert subject.encode(TEXT) == asked
    given, scored = subject.encode_pair(TEXT, " is")
    assert given == asked
    assert given + scored == subject.encode(TEXT + " is")
    empty, scored = subject.encode_pair("", TEXT)
    assert len(empty) == 1
    assert scored == plain
    # lm-eval's convention where there is nothing before a text.
    named = (*bounds.begin, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert empty[0] == next(token for token in named if token is not None)
    assert plan.mask.id not in ends


@pytest.mark.parametrize("name", ["as bert", "as roberta"])
def test_what_the_class_puts_around_a_text_is_written(tmp_path: Path, name: str) -> None:
    source = wrapped_source(tmp_path / "source", name)
    _edit(source / "tokenizer.json", {"post_processor": None})
    kind = "BertTokenizer" if name == "as bert" else "RobertaTokenizer"
    _edit(source / "tokenizer_config.json", {"tokenizer_class": kind})
    convert(source, tmp_path / "out", "mdlm")
    closing = bounds_of(AutoTokenizer.from_pretrained(source)).closing
    assert closing, "the class closes every text, whatever the file says"
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tuple(written["closing_token_ids"]) == closing
    assert closing[0] in ends_of(tmp_path / "out")


@pytest.mark.parametrize("name", ["begin and end", "end only", "two at both ends", "as bert"])
def test_generate_goes_on_from_what_the_tokenizer_closed(tmp_path: Path, name: str) -> None:
    from dllm_convert.modeling.loading import load_checkpoint

    source = wrapped_source(tmp_path / "source", name)
    convert(source, tmp_path / "out", target_of(name))
    loaded = load_checkpoint(tmp_path / "out")
    model, tokenizer = loaded.model, loaded.tokenizer
    closing, count = bounds_of(tokenizer).closing, len(bounds_of(tokenizer).closing)
    texts = [TEXT, "A list is a name of many values in"]
    settings: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None}
    for side in ("left", "right"):
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
        got = model.generate(**batch, **settings)
        width = batch.input_ids.shape[1]
        assert torch.equal(got[:, :width], batch.input_ids), "prompts come back as they were given"
        for row, text in enumerate(texts):
            ids = torch.tensor([open_ids(tokenizer, text)])
            assert not closing or ids[0, -count:].tolist() != list(closing)
            alone = model.generate(ids, **settings)
            assert got[row, width:].tolist() == alone[0, ids.shape[1] :].tolist()


def test_only_one_closing_is_left_out_and_never_a_whole_prompt() -> None:
    from dllm_convert.modeling.published.inputs import left_open

    ids = torch.tensor([[7, 8, 2, 2], [0, 0, 0, 2], [2, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    found = left_open(ids, mask, [2])
    assert found.tolist() == [[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert left_open(ids, mask, None) is mask
    assert left_open(ids[:, :1], mask[:, :1], [2]) is not None


@pytest.mark.parametrize("name", ["begin and end", "end only", "as roberta", "begin"])
def test_a_tokenizer_made_to_leave_texts_open(name: str) -> None:
    tokenizer = WRAPPED[name]()
    asked, begin = open_ids(tokenizer, TEXT), bounds_of(tokenizer).begin
    leave_open(tokenizer)
    assert tokenizer(TEXT).input_ids == asked
    assert bounds_of(tokenizer).begin == begin
    assert bounds_of(tokenizer).closing == ()


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_end_of_a_turn_is_what_transformers_renders(name: str) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = TOKENIZERS["llama"]()
    named = {role: text for role, text in tokenizer.special_tokens_map.items() if text}
    assert turn_end(template, named, [BEGIN, END, TURN]) == expected
    if expected is not None:
        roles = ("user", "assistant", "user")[: 2 if name == "must alternate" else 3]
        turns = [{"role": role, "content": "Seven." * (role == "assistant")} for role in roles]
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        assert re.search(rf"Seven\.\s*{re.escape(expected)}", text)


@pytest.mark.parametrize("kept", ["jinja", "config", "named", "json"])
def test_a_template_is_found_wherever_it_is_kept(tmp_path: Path, kept: str) -> None:
    template = TEMPLATES["chatml"][0]
    other = [{"name": "tool_use", "template": "{{ x }}"}, {"name": "default", "template": template}]
    if kept == "jinja":
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        file = "chat_template.json" if kept == "json" else "tokenizer_config.json"
        value = other if kept == "named" else template
        (tmp_path / file).write_text(json.dumps({"chat_template": value}))
    assert read_template(tmp_path) == template


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        # Qwen2.5: documents end with another token than the tokenizer's.
        ({"eos_token_id": 0}, {"eos_token_id": 0}, [0, 1]),
        # Llama 3.x: several, in both files.
        ({"eos_token_id": [1, 0]}, {"eos_token_id": [1, 0]}, [1, 0]),
        ({"eos_token_id": [0]}, {"eos_token_id": 9}, [0, 1]),
        ({}, {"eos_token_id": [0, 9]}, [0, 9, 1]),
        ({"eos_token_id": -1}, {"eos_token_id": 1}, 1),
        ({}, {"eos_token_id": None}, 1),
        ({"eos_token_id": []}, {"eos_token_id": 9}, 1),
    ],
)
def test_the_end_set(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: Any
) -> None:
    source = wrapped_source(tmp_path / "source", "begin")
    _edit(source / "config.json", config)
    _edit(source / "generation_config.json", {"eos_token_id": None, **generation})
    convert(source, tmp_path / "out", "bd3lm", light=True)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == expected


def test_the_end_of_a_turn_ends_decoding(tmp_path: Path) -> None:
    source = wrapped_source(tmp_path / "source", "begin", TEMPLATES["chatml"][0])
    convert(source, tmp_path / "out", "bd3lm")
    assert ends_of(tmp_path / "out") == (1, 2)


def _edit(path: Path, fields: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **fields}))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [1.0, "1", "</s>", [1, "2"], [1.5], True, {"a": 1}], ids=repr)
def test_an_end_that_is_no_id_is_told_by_the_plan(tmp_path: Path, file: str, value: Any) -> None:
    source = wrapped_source(tmp_path / "source", "begin")
    _edit(source / "generation_config.json", {"eos_token_id": None})
    _edit(source / file, {"eos_token_id": value})
    recipe = Recipe.model_validate({"source": str(source), "target": "mdlm"})
    with pytest.raises(IncompatibleError, match=f"{file}: eos_token_id is .*expected the id"):
        make_plan(recipe, inspect_source(str(source)))


@pytest.mark.parametrize("role", ["bos", "eos", "pad"])
def test_an_end_beyond_the_rows_is_told_by_the_plan(tmp_path: Path, role: str) -> None:
    source = wrapped_source(tmp_path / "source", "begin")
    _edit(source / "generation_config.json", {f"{role}_token_id": 50_000})
    recipe = Recipe.model_validate({"source": str(source), "target": "mdlm"})
    with pytest.raises(IncompatibleError, match=f"{role}_token_id is 50000, and the embedding has"):
        make_plan(recipe, inspect_source(str(source)))


def test_ids_as_configs_give_them() -> None:
    assert read_ids(None) == ()
    assert read_ids(3) == (3,)
    assert read_ids([3, 1, 3]) == (3, 1)
    assert read_ids((2,)) == (2,)
    assert read_ids(torch.tensor([4, 5])) == (4, 5)
    assert read_ids(torch.tensor(4)) == (4,)
    assert read_ids(-1) == ()
    for wrong in (1.0, "1", True, [None], [[1]]):
        with pytest.raises(ValueError, match="pad_token_id is"):
            read_ids(wrong, "pad_token_id")


def test_families_with_several_ends_verify(source_factory: Any, tmp_path: Path) -> None:
    """Every Llama 3.x Instruct has a list in both files."""
    from dllm_convert.verification import verify_checkpoint

    source = source_factory("llama")
    for file in ("config.json", "generation_config.json"):
        _edit(source / file, {"eos_token_id": [1, 0, 2]})
    convert(source, tmp_path / "out", "bd3lm")
    assert ends_of(tmp_path / "out") == (1, 0, 2)
    report = verify_checkpoint(
        tmp_path / "out", against=source, untrained=True, groups=("files", "tokens", "generate")
    )
    assert [probe.name for probe in report.failed] == []
    assert get_adapter("llama").targets
