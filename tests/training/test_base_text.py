"""Text that the base writes: its own law, whoever writes it and however often it is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.common.ranks import ALONE, Rank
from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.training import base_text
from dllm_convert.training.base_text import (
    Writing,
    gather,
    prepare_prompts,
    write,
    write_share,
)
from dllm_convert.training.data.content import FROM, OPEN, Document
from dllm_convert.training.data.encoding import Encoder
from dllm_convert.training.data.prompts import find_prompts
from dllm_convert.training.data.reading import Split
from dllm_convert.training.data.text import prepare_data

QUIET = Reporter(quiet=True)


@pytest.fixture
def source(source_cache: SourceFactory) -> Path:
    return source_cache("llama", chat=True)


@pytest.fixture
def base(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


@pytest.fixture
def tokenizer(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(source)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Documents, and a conversation for every third of them."""
    rows: list[dict[str, Any]] = []
    for number in range(60):
        rows.append({"text": f"Document {number} says this and that. " * (1 + number % 4)})
        if number % 3 == 0:
            said = [("system", "Be brief."), ("user", f"What is {number}?"),
                    ("assistant", "A number."), ("user", "And?")]  # fmt: skip
            rows.append({"messages": [{"role": r, "content": c} for r, c in said]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


def data(texts: Path, **asked: Any) -> Data:
    known = {"prompts": 30, "prompt_tokens": 7, **asked}
    return Data(source=str(texts), sequence_length=48, write_with_base=known)


def writing(**changed: Any) -> Writing:
    known = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "batch_size": 4, "seed": 0,
             "ends": (1,)}  # fmt: skip
    return Writing(**{**known, **changed})


def plain(*ids: list[int]) -> list[dict[str, Any]]:
    return [{"ids": one, "key": 1, "messages": None, "tools": []} for one in ids]


def test_prompts_are_beginnings_and_questions_and_none_is_held_out(
    texts: Path, tokenizer: Any
) -> None:
    asked = data(texts, prompts=1000).model_copy(update={"held_out_fraction": 0.3})
    prompts, facts = find_prompts(asked, tokenizer)
    split = Split.by_fraction(0.3)
    kept = []
    for line in texts.read_text().splitlines():
        row = json.loads(line)
        content = row.get("text") or tuple(row["messages"])
        if not split.holds_out(Document(content, "").key):
            kept.append(row)
    assert len(prompts) == len(kept) == facts["prompts"] < 60 < facts["looked_at"] == 80
    for prompt, row in zip(prompts, kept, strict=True):
        if "text" in row:
            assert prompt.ids == tokenizer(row["text"])["input_ids"][:7]
        else:
            # Up to where the answer begins; what the assistant said is not told.
            assert prompt.messages == row["messages"][:2]
            expected = tokenizer.apply_chat_template(
                row["messages"][:2], add_generation_prompt=True, tokenize=False
            )
            assert tokenizer.decode(prompt.ids) == expected
    first, _ = find_prompts(data(texts, prompts=5), tokenizer)
    assert len(first) == 5


def test_where_nothing_can_be_asked_it_is_said(texts: Path, tokenizer: Any, tmp_path: Path) -> None:
    empty = tmp_path / "b.jsonl"
    turns = [{"role": "assistant", "content": "Hello."}]
    empty.write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError, match="nothing for the base to go on from"):
        find_prompts(data(empty), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template to be asked in"):
        find_prompts(data(texts), tokenizer)


def test_what_stands_beside_a_prompt_does_not_change_its_answer(base: Any, tokenizer: Any) -> None:
    """Greedily, each answer is the argmax of the base's own forward, whatever fills the batch."""
    prompts = [[5, 9, 20, 33, 41, 7], [8, 60], [100]]
    how = writing(temperature=0.0, ends=())
    expected = []
    for ids in prompts:
        tokens = list(ids)
        for _ in range(12):
            with torch.no_grad():
                tokens.append(int(base(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
    # Settings that the base brings along are not asked for.
    base.generation_config.repetition_penalty = 5.0
    rows = write(base, tokenizer, plain(*prompts), how, 0)
    assert [row["row"]["text"] for row in rows] == expected
    assert all(row["tokens"] == 12 and not row["ended"] for row in rows)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3)])
def test_it_draws_from_the_bases_distribution(
    temperature: float, top_p: float, base: Any, tokenizer: Any
) -> None:
    """The first token of 6,000 answers, against the softmax of the base's forward."""
    prompt, draws = [5, 9, 20], 6000
    with torch.no_grad():
        law = (base(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    law[len(tokenizer) :] = 0
    order = law.argsort(descending=True)
    kept = order[: int((law[order].cumsum(0) < top_p).sum()) + 1]
    law = torch.zeros_like(law).index_copy_(0, kept, law[kept])
    law = law / law.sum()
    how = writing(max_new_tokens=1, temperature=temperature, top_p=top_p, ends=())
    drawn = torch.zeros_like(law)
    real = base.generate

    def counted(*args: Any, **settings: Any) -> Any:
        out = real(*args, **settings)
        drawn.index_add_(0, out[:, -1], torch.ones(len(out), dtype=drawn.dtype))
        return out

    base.generate = counted
    for number in range(3):
        write(base, tokenizer, plain(*[prompt] * (draws // 3)), how, number)
    assert drawn.sum() == draws
    # Half the sum of differences of a sample of n is about sqrt(k / (2 pi n)) for k words.
    distance = float((drawn / draws - law).abs().sum() / 2)
    words = int((law > 0).sum())
    assert distance < 2 * (words / (2 * torch.pi * draws)) ** 0.5 + 0.01
    assert float(drawn[law == 0].sum()) == 0


def answers(folder: Path) -> str:
    return (folder / base_text.TEXT).read_text(encoding="utf-8")


def written(
    folder: Path, texts: Path, base: Any, tokenizer: Any, how: Writing, places: list[Rank]
) -> dict[str, Any]:
    prepare_prompts(data(texts), tokenizer, folder)
    for place in places:
        write_share(lambda: base, tokenizer, folder, how, place, lambda count: None)
    return gather(folder, how)


def test_who_writes_and_how_often_it_is_stopped_changes_nothing(
    texts: Path, base: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = writing(ends=tuple(range(0, 384, 9)))
    whole = written(tmp_path / "one", texts, base, tokenizer, how, [ALONE])
    three = [Rank(rank, 3, True) for rank in (2, 0, 1)]
    assert written(tmp_path / "three", texts, base, tokenizer, how, three) == whole
    assert answers(tmp_path / "three") == answers(tmp_path / "one")
    assert whole["prompts"] == 30 and 0 < whole["ended"] < 30 and whole["seed"] == 0

    # Killed at every batch in turn, once with half a file left behind, on other processes each
    # time; and the text that prompts are from is gone by then.
    folder, asked = tmp_path / "killed", 0
    prepare_prompts(data(texts), tokenizer, folder)
    texts.rename(tmp_path / "gone.jsonl")
    real = base_text.write

    def killed(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked % 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(base_text, "write", killed)
    for attempt in range(40):
        (folder / base_text.BATCHES).mkdir(exist_ok=True)
        (folder / base_text.BATCHES / f"{attempt % 8}.json.partial").write_text('{"rows": [')
        place = Rank(attempt % 2, 2, True)
        try:
            write_share(lambda: base, tokenizer, folder, how, place, lambda count: None)
        except KeyboardInterrupt:
            continue
    assert gather(folder, how) == whole
    assert answers(folder) == answers(tmp_path / "one")
    assert sorted(path.name for path in folder.iterdir()) == [
        base_text.FACTS, base_text.ABOUT, base_text.TEXT,
    ]  # fmt: skip
    # Another seed writes something else; and going on once more changes nothing: of a run that was
    # killed before it took note, prompts and batches are gone.
    write_share(lambda: base, tokenizer, folder, how, ALONE, lambda count: None)
    assert gather(folder, how) == whole
    monkeypatch.setattr(base_text, "write", real)
    (tmp_path / "gone.jsonl").rename(texts)
    other = written(tmp_path / "other", texts, base, tokenizer, writing(seed=1), [ALONE])
    assert other["fingerprint"] != whole["fingerprint"]


def test_what_was_cut_off_is_not_learnt_with_an_end(
    texts: Path, base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    end = tokenizer.eos_token_id
    prompts = [
        *plain([5, 9, 20]),
        {"ids": [5, 9], "key": 1, "messages": [{"role": "user", "content": "What?"}], "tools": []},
    ]
    cut = write(base, tokenizer, prompts, writing(ends=()), 0)
    assert cut[0]["row"][OPEN] is True and cut[1]["row"] is None
    ended = write(base, tokenizer, prompts, writing(ends=tuple(range(384))), 0)
    # Nothing was said before the end: of an answer there is nothing to learn.
    said = tokenizer.decode([5, 9, 20])
    assert ended[0]["row"] == {"text": said, FROM: 1} and ended[1]["row"] is None
    some = writing(ends=tuple(range(0, 384, 5)), max_new_tokens=40)
    answered = [
        row["row"]
        for number in range(9)
        for row in write(base, tokenizer, prompts[1:], some, number)
    ]
    kept = [row for row in answered if row is not None]
    assert kept and all(row["messages"][-1]["role"] == "assistant" for row in kept)
    assert all(row["messages"][0] == prompts[1]["messages"][0] for row in kept)

    encoder = Encoder(tokenizer, Data())
    from dllm_convert.training.data.content import find_documents

    for row, closes in ((cut[0]["row"], False), (ended[0]["row"], True)):
        (document,) = find_documents(row, Data(), "row 1")
        assert document.key == 1  # held out where what it was begun from is
        (found,) = encoder.encode([document])
        assert (found.ids[-1] == end) == closes


def test_it_is_trained_on_and_the_texts_own_held_out_documents_are_measured(
    texts: Path, base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    how = writing(ends=tuple(range(0, 384, 9)))
    written(tmp_path / "w", texts, base, tokenizer, how, [ALONE])
    recipe = Recipe.model_validate(
        {
            "source": "x", "target": "mdlm",
            "data": data(texts).model_dump() | {"held_out_fraction": 0.3},
            "training": {"steps": 4},
        }
    )  # fmt: skip
    plain_text = recipe.data.model_dump() | {"write_with_base": {}}
    foreign = prepare_data(
        Recipe.model_validate({**recipe.model_dump(), "data": plain_text}), tokenizer, QUIET
    )
    own = prepare_data(recipe, tokenizer, QUIET, written=tmp_path / "w")
    assert own.facts["held_out_documents"] == foreign.facts["held_out_documents"]
    assert all(
        torch.equal(one.tokens, other.tokens)
        for one, other in zip(own.held_out, foreign.held_out, strict=True)
    )
    rows = own.training_rows(start=0, total=60)
    trained = " ".join(tokenizer.decode(rows[number]["input_ids"]) for number in range(60))
    lines = [json.loads(line) for line in answers(tmp_path / "w").splitlines()]
    assert sum(line["text"][:20] in trained for line in lines if "text" in line) > 5
    assert "says this and that. Document" not in trained


def test_a_base_that_never_ends_an_answer_is_said(
    base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    chats = tmp_path / "c.jsonl"
    row = {
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"}]
    }
    chats.write_text("\n".join([json.dumps(row), json.dumps({"prompt": "a", "completion": "b"})]))
    with pytest.raises(DataError, match="none can be learnt from") as caught:
        written(tmp_path / "w", chats, base, tokenizer, writing(ends=()), [ALONE])
    assert "max_new_tokens" in str(caught.value.hint)
