"""Conversations: what is rendered, what of it is scored, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from transformers import AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.training.data.chat import ChatEncoder, find_messages
from dllm_convert.training.data.content import Document
from dllm_convert.training.data.encoding import Encoder
from dllm_convert.training.data.text import prepare_data

USER = {"role": "user", "content": "What is it?"}
SHORT = {"role": "assistant", "content": "A cat."}
AGAIN = {"role": "user", "content": "And that?"}
LAST = {"role": "assistant", "content": "  A dog, on a log.\n"}
SHARED = {"from": "gpt", "value": "A cat."}
SYSTEM = {"role": "system", "content": "Be brief."}

MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Opens the last turn with an empty thought and strips the earlier ones, as Qwen3 does.
THINKING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# No start of a turn to generate from, strict roles: Llama 2 and Mistral.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'].strip() }}<|end|>{% endif %}"
    "{% endfor %}"
)
# Numbers its turns from the end: nothing that stood before is a beginning of the whole.
SHIFTY = (
    "{% for m in messages %}<|start|>{{ loop.revindex }} {{ m['role'] }}\n{{ m['content'] }}<|end|>"
    "\n{% endfor %}"
)
# Opens another turn of the assistant whether it is asked to or not, as early Llama 3 files do.
EAGER = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'].strip() }}<|end|>{% endfor %}"
    "{% if true %}<|start|>assistant\n{% endif %}"
)
PLAIN = None


@pytest.fixture
def tokenizer(source_cache: SourceFactory) -> Callable[[str | None], Any]:
    def make(template: str | None) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(source_cache("llama"))
        if template:
            tokenizer.chat_template = template
        return tokenizer

    return make


def scored(tokenizer: Any, messages: list[Any], turns: Any = "all") -> tuple[str, list[str]]:
    """Return the whole text and the pieces of it that are scored."""
    ids, mask = ChatEncoder(tokenizer, turns).encode(messages, "row 1")
    assert len(ids) == len(mask)
    pieces: list[list[int]] = []
    for i, (token, is_scored) in enumerate(zip(ids, mask, strict=True)):
        if is_scored and (i == 0 or not mask[i - 1]):
            pieces.append([])
        if is_scored:
            pieces[-1].append(token)
    return tokenizer.decode(ids), [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefix", "marks"])
def test_every_turn_of_the_assistant_is_scored_with_its_end(
    template: str | None, tokenizer: Any
) -> None:
    made = tokenizer(template)
    messages = [SYSTEM, USER, SHORT, AGAIN, LAST]
    text, pieces = scored(made, messages)
    assert text == made.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert pieces == ["A cat.<|end|>", "  A dog, on a log.\n<|end|>"]
    assert scored(made, messages, "last")[1] == pieces[1:]


def test_both_ways_give_the_same_tokens(tokenizer: Any) -> None:
    messages = [USER, SHORT, AGAIN, {"role": "assistant", "content": "\n\nçé <|end|> 猫"}]
    by_marks = ChatEncoder(tokenizer(MARKED), "all").encode(messages, "row 1")
    by_prefix = ChatEncoder(tokenizer(PLAIN), "all").encode(messages, "row 1")
    assert by_marks[0] == by_prefix[0]
    different = [
        i for i, (a, b) in enumerate(zip(by_marks[1], by_prefix[1], strict=True)) if a != b
    ]
    assert len(different) <= 1  # A token that the prompt's line break and the answer share.


def test_an_empty_thought_before_the_last_turn(tokenizer: Any) -> None:
    _, pieces = scored(tokenizer(THINKING), [USER, SHORT, AGAIN, LAST])
    assert pieces[0] == "A cat.<|end|>"
    assert pieces[1].startswith("<think>")
    assert pieces[1].endswith("A dog, on a log.\n<|end|>")


def test_a_thought_that_the_template_drops_is_refused(tokenizer: Any) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA cat."}
    with pytest.raises(
        DataError, match=r"hides where the assistant's turn \(message 2\)"
    ) as caught:
        scored(tokenizer(THINKING), [USER, thought, AGAIN, LAST])
    assert caught.value.hint and "scored_turns=last" in caught.value.hint
    _, pieces = scored(tokenizer(THINKING), [USER, thought, AGAIN, LAST], "last")
    assert len(pieces) == 1


@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_template_that_always_opens_another_turn(turns: str, tokenizer: Any) -> None:
    text, pieces = scored(tokenizer(EAGER), [USER, SHORT, AGAIN, LAST], turns)
    assert pieces == ["A cat.<|end|>", "A dog, on a log.<|end|>"][-len(pieces) :]
    assert text.endswith("A dog, on a log.<|end|>")


@pytest.mark.parametrize("content", ["think", "assistant", "end", "<|end|>", "a\n", "What is it?"])
@pytest.mark.parametrize("template", [PLAIN, THINKING, EAGER, STRICT, MARKED])
def test_content_that_looks_like_the_template(
    template: str | None, content: str, tokenizer: Any
) -> None:
    turn = {"role": "assistant", "content": content}
    for messages in ([USER, turn], [USER, turn, AGAIN, turn]):
        text, pieces = scored(tokenizer(template), messages)
        assert len(pieces) == len(messages) // 2
        assert all(piece.count(content.strip()) >= 1 for piece in pieces)
        assert all("What" not in piece or "What" in content for piece in pieces)
        assert all(piece.endswith("<|end|>") for piece in pieces)
        assert text.endswith("<|end|>")


def test_a_template_without_a_generation_prompt(tokenizer: Any) -> None:
    text, pieces = scored(tokenizer(STRICT), [USER, SHORT, AGAIN, LAST])
    assert text.startswith("[INST] What is it? [/INST] A cat.<|end|>[INST]")
    assert [piece.strip() for piece in pieces] == ["A cat.<|end|>", "A dog, on a log.<|end|>"]


def test_a_template_that_refuses_the_roles_is_quoted(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"refuses row 1 \(roles must alternate\)"):
        scored(tokenizer(STRICT), [SYSTEM, USER, SHORT])


def test_a_template_that_cannot_be_followed_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="hides where the assistant's turn") as caught:
        scored(tokenizer(SHIFTY), [USER, SHORT])
    assert caught.value.hint and "generation" in caught.value.hint


def test_the_end_token_is_appended_and_scored_where_the_template_ends_otherwise(
    tokenizer: Any,
) -> None:
    made = tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids, mask = ChatEncoder(made, "all").encode([USER, SHORT], "row 1")
    assert ids[-1] == made.eos_token_id
    assert mask[-1]
    assert made.decode([t for t, is_scored in zip(ids, mask, strict=True) if is_scored]).endswith(
        "A cat.<|end|>"
    )


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    made = tokenizer(PLAIN)
    assert scored(made, [USER, SHORT, AGAIN]) == scored(made, [USER, SHORT])
    assert ChatEncoder(made, "all").encode([USER], "row 1") == ([], [])
    assert ChatEncoder(made, "all").encode([], "row 1") == ([], [])


def test_no_template(source_cache: SourceFactory) -> None:
    bare = AutoTokenizer.from_pretrained(source_cache("qwen2"))
    with pytest.raises(DataError, match="no chat template") as caught:
        ChatEncoder(bare, "all")
    assert caught.value.hint and "-Instruct" in caught.value.hint


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, SHORT]},
        {"text": [USER, SHORT]},
        {"messages": {"role": ["user", "assistant"], "content": ["What is it?", "A cat."]}},
        {"conversations": [{"from": "human", "value": "What is it?"}, SHARED]},
        {"conversations": [{**USER, "name": None}, {**SHORT, "tool_calls": None}]},
        {"prompt": "What is it?", "completion": "A cat."},
        {"prompt": [USER], "completion": [SHORT], "id": 3},
    ],
)  # fmt: skip
def test_columns_that_hold_a_conversation(row: dict[str, Any]) -> None:
    assert find_messages(row, "text", "row 1") == (USER, SHORT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "row 1 holds a str, expected a text or a list of messages"),
        ({"text": 3}, "row 1 holds a int"),
        ({"messages": ["a"]}, "message 1 is a str, expected an object with role and content"),
        ({"messages": [{"content": "a"}]}, r"message 1 has no role, it has \['content'\]"),
        ({"messages": [USER, {"role": "user"}]}, r"message 2 has no content, it has \['role'\]"),
        ({"prompt": [{"role": 3, "content": ""}], "completion": "a"}, "message 1 has no role"),
    ],
)
def test_columns_that_do_not(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_messages(row, "text", "row 1")
    assert caught.value.hint


def test_a_long_conversation_keeps_its_beginning(tokenizer: Any) -> None:
    made = tokenizer(PLAIN)
    content = (USER, {"role": "assistant", "content": "word " * 100})
    whole = Encoder(made, Data(sequence_length=1000)).encode([Document(content, "row 1")])[0]
    start = int(whole.scored.argmax())  # type: ignore[union-attr]
    for length, kept in ((start + 5, start + 5), (start, 0), (2, 0), (1000, len(whole.ids))):
        cut = Encoder(made, Data(sequence_length=length)).encode([Document(content, "row 1")])[0]
        assert cut.ids.tolist() == whole.ids[:kept].tolist()
        assert cut.truncated == (length < len(whole.ids))


def prepare(folder: Path, tokenizer: Any, target: str = "bd3lm", **data: Any) -> Any:
    lines = []
    for number in range(40):
        answer = {"role": "assistant", "content": f"{number} " * (number % 7 + 1)}
        lines.append(json.dumps({"messages": [USER, answer] if number else [USER]}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    recipe = Recipe.model_validate(
        {
            "source": "x",
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "data": {"source": str(folder), "sequence_length": 64, **data},
            "training": {"steps": 5, "batch_size": 2},
        }
    )
    return prepare_data(recipe, tokenizer, Reporter(quiet=True))


@pytest.mark.parametrize("streaming", ["off", "on"])
@pytest.mark.parametrize("weight", [0, 1])
def test_conversations_without_anything_to_learn_are_told_as_such(
    tmp_path: Path, tokenizer: Any, weight: int, streaming: str
) -> None:
    made = tokenizer(PLAIN)
    made.add_special_tokens({"mask_token": "<|mask|>"})
    asked = {**USER, "content": USER["content"] * (1 if weight == 0 else 99)}
    answer = {"role": "assistant", "content": "A cat.", "weight": weight}
    rows = [json.dumps({"messages": [asked, answer]})] * 30
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    source = str(tmp_path / "chats.jsonl")
    data = {"source": source, "sequence_length": 64, "streaming": streaming}
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm", "data": data})
    with pytest.raises(DataError, match="holds nothing to learn from: in 30 conv") as caught:
        prepare_data(recipe, made, Reporter(quiet=True))
    assert caught.value.hint and "data.sequence_length" in caught.value.hint


def test_rows_of_chats(tmp_path: Path, tokenizer: Any) -> None:
    made = tokenizer(PLAIN)
    made.add_special_tokens({"mask_token": "<|mask|>"})
    data = prepare(tmp_path, made)
    assert data.facts["chats"] == data.facts["documents"]
    assert data.facts["silent"] == 1
    assert 0 < data.facts["padding_share"] < 0.5
    rows = data.training_rows(start=0, total=data.facts["rows"])
    for row in (rows[number] for number in range(len(rows))):
        for segment in range(row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            ids, loss = row["input_ids"][inside], row["loss_mask"][inside]
            assert inside.sum() % 8 == 0
            assert ids[loss][-1] == made.eos_token_id
            text = made.decode(ids[loss])
            assert text.replace("<|end|>", "").split()[0].isdigit() and "What" not in text
            fill = ids[loss.nonzero()[0][-1] + 1 :]
            assert (fill == made.mask_token_id).all()
    assert all(int(batch.scorable.sum()) for batch in data.held_out)


@pytest.mark.parametrize(("target", "unit"), [("bd3lm", 8), ("mdlm", 64)])
def test_supervised_padding_ends_every_sample_with_scored_ends(
    target: str, unit: int, tmp_path: Path, tokenizer: Any
) -> None:
    made = tokenizer(PLAIN)
    data = prepare(tmp_path, made, target, supervise_padding=True)
    rows = data.training_rows(start=0, total=data.facts["rows"])
    for row in (rows[number] for number in range(len(rows))):
        for segment in range(row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            assert inside.sum() % unit == 0
            assert row["loss_mask"][inside][-1]
            assert row["input_ids"][inside][-1] == made.eos_token_id


def test_mdlm_fills_nothing_on_its_own(tmp_path: Path, tokenizer: Any) -> None:
    made = tokenizer(PLAIN)
    data = prepare(tmp_path, made, "mdlm")
    rows = data.training_rows(start=0, total=data.facts["rows"])
    row = rows[0]
    for segment in range(row["segment_ids"].max() + 1):
        assert row["loss_mask"][row["segment_ids"] == segment][-1]
