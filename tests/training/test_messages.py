"""What goes into a chat template comes out of it, or the row is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import SourceFactory
from transformers import AutoTokenizer

from dllm_convert.common import bounded
from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.chat import ChatEncoder, find_messages
from dllm_convert.training.data.content import find_documents
from dllm_convert.training.data.encoding import Encoder

TURN = "<|start|>{{ m['role'] }}\n"
CLOSE = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{{ m['content'] }}" + CLOSE
# Passes over roles that it does not name, as Qwen's and Zephyr's do.
NAMED = (
    "{% for m in messages %}{% if m.role in ['user', 'system', 'assistant'] %}"
    + TURN
    + "{{ m['content'] | trim }}<|end|>\n{% endif %}"
    + CLOSE.replace("<|end|>\n", "", 1)
)
# Takes lists of parts only, as those of models that see.
PARTS = (
    "{% for m in messages %}"
    + TURN
    + "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}" + CLOSE
)
BOTH = (
    "{% for m in messages %}"
    + TURN
    + "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ part['text'] }}{% endfor %}{% endif %}" + CLOSE
)
CALLS = (
    "{% if tools %}<|start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>\n"
    "{% endif %}{% for m in messages %}"
    + TURN
    + "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}[{{ c['function']['name'] }} "
    "{{ c['function']['arguments'] | tojson }}]{% endfor %}" + CLOSE
)
# Joins the arguments to a text, so that they have to be one (DeepSeek).
WRITTEN = CALLS.replace(
    "{{ c['function']['arguments'] | tojson }}", "{{ '' + c['function']['arguments'] }}"
)
# Drops earlier thoughts, keeps the last (Qwen3).
THINKING = (
    "{% for m in messages %}"
    + TURN
    + "{{ m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip('\n') }}"
    + CLOSE
)
# Drops every thought.
THOUGHTLESS = THINKING.replace("m['content'] if loop.last else ", "")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + PLAIN
)
FIRST_USER = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    + TURN
    + "{{ m['content'] }}"
    + CLOSE
)
MARKED = (
    "{% for m in messages %}"
    + TURN
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}" + CLOSE
)

USER = {"role": "user", "content": "What is it?"}
CAT = {"role": "assistant", "content": "A cat."}
Learn = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def learn(source_cache: SourceFactory) -> Learn:
    """Return the whole text of a row and the pieces of it that are learnt."""

    def see(row: dict[str, Any], template: str = PLAIN, turns: Any = "all") -> Any:
        tokenizer = AutoTokenizer.from_pretrained(source_cache("llama"))
        tokenizer.chat_template = template
        messages = find_messages(row, "text", "a.jsonl line 7")
        assert messages is not None
        ids, scored = ChatEncoder(tokenizer, turns).encode(messages, "a.jsonl line 7")
        pieces: list[list[int]] = []
        for i, one in enumerate(scored):
            if one and not (i and scored[i - 1]):
                pieces.append([])
            if one:
                pieces[-1].append(ids[i])
        return tokenizer.decode(ids), [tokenizer.decode(piece) for piece in pieces]

    return see


def parts(*texts: str, **more: Any) -> list[Any]:
    return [{"type": "text", "text": text, **more} for text in texts]


@pytest.mark.parametrize("template", [PLAIN, PARTS, BOTH, MARKED])
def test_parts_are_their_text_whatever_the_template_takes(template: str, learn: Learn) -> None:
    row = {
        "messages": [
            {"role": "user", "content": parts("What ", "is it?", image=None)},
            {"role": "assistant", "content": [{"type": "output_text", "text": "A "}, "cat."]},
        ]
    }
    assert learn(row, template) == learn({"messages": [USER, CAT]}, template)
    text, pieces = learn(row, template)
    assert text.count("What is it?") == 1
    assert pieces == ["A cat.<|end|>"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "refusal", "refusal": "no"},
        {"type": "text"},
        3,
    ],
)
def test_parts_that_are_no_text_are_refused(part: Any, learn: Learn) -> None:
    row = {"messages": [{"role": "user", "content": [*parts("see"), part]}, CAT]}
    with pytest.raises(DataError, match=r"a.jsonl line 7, message 1 \(user\) has a part"):
        learn(row)


@pytest.mark.parametrize("content", [3, True, 2.5])
def test_a_content_that_is_no_text_is_refused(content: Any, learn: Learn) -> None:
    with pytest.raises(DataError, match=r"message 2 \(assistant\) has a content that is a"):
        learn({"messages": [USER, {"role": "assistant", "content": content}]})


CALL = {"name": "add", "arguments": {"a": 2, "b": 'x "é" \n'}}
ANSWERS = [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]


@pytest.mark.parametrize("template", [CALLS, WRITTEN])
@pytest.mark.parametrize(
    "call",
    [
        {"content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"content": "", "tool_calls": [{"function": CALL}], "function_call": None},
        {"function_call": CALL},
        {"tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
    ],
)
def test_calls_of_tools_are_learnt(call: dict[str, Any], template: str, learn: Learn) -> None:
    text, pieces = learn({"messages": [USER, {"role": "assistant", **call}, *ANSWERS]}, template)
    assert len(pieces) == 2
    assert pieces[0].startswith('[add {"a": 2, "b": ')
    assert pieces[0].endswith("}]<|end|>")
    assert pieces[1] == "four<|end|>"
    assert "None" not in text


def test_a_sharegpt_call_and_what_was_observed(learn: Learn) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "four"},
        ],
        "tools": json.dumps([{"name": "add", "parameters": {"type": "object"}}]),
    }
    text, pieces = learn(row, CALLS)
    assert '"name": "add"' in text.partition("2+2?")[0]
    assert "<|start|>tool\n4<|end|>" in text
    assert len(pieces) == 2


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": CALL}]}]},
            NAMED,
            r"drops the call of a.jsonl line 7, message 2 \(assistant\)",
        ),
        (
            {"messages": [USER, CAT, {"role": "tool", "content": "4"}, CAT]},
            NAMED,
            r"drops the content of a.jsonl line 7, message 3 \(tool\)",
        ),
        (
            {"messages": [USER, CAT, {"role": "tool", "content": "A"}, CAT]},
            NAMED,
            r"drops the content of a.jsonl line 7, message 3 \(tool\)",
        ),
        (
            {"messages": [USER, CAT], "tools": [{"name": "add"}]},
            PLAIN,
            "drops the tools of a.jsonl line 7, of them 'add'",
        ),
        (
            {"messages": [{"role": "narrator", "content": "Once."}, USER, CAT]},
            PLAIN,
            "a.jsonl line 7, message 1 has the role 'narrator'",
        ),
        (
            {"messages": [USER, {**CAT, "content": "<think>hm</think>\nA cat."}]},
            THOUGHTLESS,
            r"drops the thought of a.jsonl line 7, message 2 \(assistant\)",
        ),
        (
            {"messages": [USER, {**CAT, "reasoning_content": "hm"}]},
            PLAIN,
            r"drops the reasoning_content of a.jsonl line 7, message 2 \(assistant\)",
        ),
        (
            {"conversations": [USER, {"from": "function_call", "value": "clock()"}, CAT]},
            PLAIN,
            r"line 7, message 2 \(function_call\) is no call of a tool",
        ),
        (
            {"system": "Rhyme.", "messages": [{"role": "system", "content": "Do not."}, USER, CAT]},
            PLAIN,
            "line 7 has a column system and another message of the role system",
        ),
        (
            {"system": "Rhyme.", "messages": [USER, CAT]},
            NO_SYSTEM,
            r"refuses a.jsonl line 7 \(System role not supported\)",
        ),
        (
            {"messages": [CAT, USER, CAT]},
            FIRST_USER,
            r"refuses a.jsonl line 7 \(Conversation roles must alternate",
        ),
        (
            {"messages": [USER, {**CAT, "weight": 0.5}]},
            PLAIN,
            r"line 7, message 2 \(assistant\) has the weight 0.5, expected 0 or 1",
        ),
        (
            {"messages": [USER, {**CAT, "loss": 0.5}]},
            PLAIN,
            r"line 7, message 2 \(assistant\) has the loss 0.5, expected 0 or 1",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "narrator", "value": "x"},
                ]
            },
            PLAIN,
            "line 7, message 2 has the role 'narrator', which the chat template does not know",
        ),
        (
            {"messages": [USER, CAT, {"role": "narrator", "content": "x"}]},
            NAMED,
            "line 7, message 3 has the role 'narrator'",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": {"a": 1}}]},
            PLAIN,
            r"line 7, message 2 \(assistant\) has a part of \['a'\], expected text",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            PLAIN,
            r"line 7, message 2 has no content, it has \['role'\]",
        ),
        (
            {"system_prompt": "Rhyme.", "messages": [{"role": "system", "content": "No."}, CAT]},
            PLAIN,
            "line 7 has a column system_prompt and another message of the role system",
        ),
        ({"messages": b"bytes"}, PLAIN, "line 7 holds a bytes, expected a text or a list"),
        ({"messages": [USER, CAT], "tools": "not json"}, PLAIN, "column tools that is not JSON"),
        ({"messages": [USER, CAT], "tools": [1]}, PLAIN, "column tools that is no list of objects"),
    ],
)
def test_what_would_be_lost_is_refused_by_its_name(
    row: dict[str, Any], template: str, message: str, learn: Learn
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        learn(row, template)
    assert caught.value.hint


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_weight_of_0_is_not_learnt(turns: str, template: str, learn: Learn) -> None:
    wrong = {"role": "assistant", "content": "WRONG", "weight": 0}
    text, pieces = learn({"messages": [USER, wrong, USER, {**CAT, "weight": 1}]}, template, turns)
    assert "WRONG" in text
    assert pieces == ["A cat.<|end|>"]
    text, pieces = learn({"messages": [USER, CAT, USER, wrong]}, template, turns)
    assert pieces == ["A cat.<|end|>"]
    assert learn({"messages": [USER, wrong]}, template, turns) == ("", [])


@pytest.mark.parametrize("name", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, None)])
def test_what_is_not_to_be_learnt_by_any_name(name: str, no: Any, yes: Any, learn: Learn) -> None:
    wrong = {"from": "gpt", "value": "WRONG", name: no}
    turns = {"conversations": [USER, wrong, USER, {**CAT, name: yes}]}
    assert learn(turns, PLAIN)[1] == ["A cat.<|end|>"]


def test_a_name_that_says_something_else_is_passed_over(learn: Learn) -> None:
    assert learn({"messages": [USER, {**CAT, "train": "split"}]}, PLAIN)[1] == ["A cat.<|end|>"]


@pytest.mark.parametrize("role", ["gpt", "chatgpt", "bing", "bard", "Model"])
def test_assistants_by_other_names(role: str, learn: Learn) -> None:
    assert learn({"messages": [USER, {**CAT, "role": role}]}, PLAIN)[1] == ["A cat.<|end|>"]


@pytest.mark.parametrize("template", [PLAIN, NAMED, MARKED, BOTH, PARTS])
def test_a_column_system_and_developers_speak_as_the_system(template: str, learn: Learn) -> None:
    rhyme = {"role": "system", "content": "Rhyme."}
    expected = learn({"messages": [rhyme, USER, CAT]}, template)
    assert "<|start|>system\nRhyme.<|end|>" in expected[0]
    for row in (
        {"system": "Rhyme.", "messages": [USER, CAT]},
        {"system": "Rhyme.", "messages": [rhyme, USER, CAT]},
        {"system_prompt": "Rhyme.", "messages": [USER, CAT]},
        {"system_message": "Rhyme.", "prompt": USER["content"], "completion": CAT["content"]},
        {"system": "Rhyme.", "prompt": USER["content"], "completion": CAT["content"]},
        {"messages": [{**rhyme, "role": "developer"}, USER, CAT]},
        {"messages": [{**rhyme, "role": "System"}, {**USER, "role": "Human"}, CAT]},
        {"system": " ", "messages": [rhyme, USER, CAT]},
        {"system": None, "messages": [rhyme, USER, CAT], "tools": []},
    ):
        assert learn(row, template) == expected


def test_a_role_that_the_template_names_keeps_its_name(learn: Learn) -> None:
    template = NAMED.replace("'system'", "'system', 'developer'")
    text, _ = learn({"messages": [{"role": "developer", "content": "Rhyme."}, USER, CAT]}, template)
    assert "<|start|>developer\nRhyme." in text


@pytest.mark.parametrize("template", [PLAIN, NAMED, MARKED, PARTS, THINKING])
@pytest.mark.parametrize("content", ["Hello!", " a\n", "assistant"])
def test_the_assistant_may_speak_first(content: str, template: str, learn: Learn) -> None:
    first = {"role": "assistant", "content": content}
    _, pieces = learn({"messages": [first, USER, CAT]}, template)
    assert [piece.strip() for piece in pieces] == [
        f"{content.strip()}<|end|>",
        "A cat.<|end|>",
    ] or (
        [piece.replace("\n", "").strip() for piece in pieces]
        == [f"{content.strip()}<|end|>", "A cat.<|end|>"]
    )
    _, pieces = learn({"messages": [first]}, template)
    assert len(pieces) == 1


def test_an_earlier_thought_may_go_and_the_last_stays(learn: Learn) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA cat."}
    text, pieces = learn({"messages": [USER, thought, USER, thought]}, THINKING, "last")
    assert text.count("hm") == 1
    assert pieces == ["<think>\nhm\n</think>\n\nA cat.<|end|>"]


def test_an_empty_answer_is_its_end(learn: Learn) -> None:
    _, pieces = learn({"messages": [USER, {**CAT, "content": ""}, USER, CAT]})
    assert pieces == ["<|end|>", "A cat.<|end|>"]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Say it.", "input": "", "output": "A cat."}, "Say it."),
        ({"instruction": "Say it.", "input": None, "output": "A cat."}, "Say it."),
        ({"instruction": "Say it.", "output": "A cat."}, "Say it."),
        ({"instruction": "Say it.", "input": "Twice.", "output": "A cat."}, "Say it.\nTwice."),
    ],
)
def test_alpaca_columns_are_a_conversation(row: Any, asked: str, learn: Learn) -> None:
    text, pieces = learn(row)
    assert f"<|start|>user\n{asked}<|end|>" in text
    assert pieces == ["A cat.<|end|>"]
    text, pieces = learn({**row, "history": [["a", "b"]], "system": "Rhyme."})
    assert text.index("Rhyme.") < text.index("user\na<") < text.index(asked)
    assert pieces == ["b<|end|>", "A cat.<|end|>"]


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("prompt", "chosen", "rejected"), "--set data.text_field=chosen"),
        (
            ("question", "answer"),
            "--set data.columns.prompt=question --set data.columns.completion=answer",
        ),
        (("question", "response"), "--set data.columns.completion=response"),
        (("instruction", "response"), "--set data.columns.prompt=instruction"),
        (("instruction", "context", "response"), "--set data.columns.input=context"),
        (("body",), "--set data.text_field=COLUMN"),
    ],
)
def test_columns_that_are_not_read_are_told_apart(columns: tuple[str, ...], hint: str) -> None:
    row = dict.fromkeys(columns, "x")
    with pytest.raises(DataError, match="has no column 'text'") as caught:
        list(find_documents(row, Data(), "row 1"))
    assert caught.value.hint and hint in caught.value.hint


@pytest.mark.parametrize(
    "row",
    [
        {"text": "half \ud800 of it"},
        {"messages": [USER, {**CAT, "content": "\udfff"}]},
        {"prompt": "\ud83d", "completion": "a"},
    ],
)
def test_half_a_character_is_refused(row: Any) -> None:
    with pytest.raises(DataError, match=r"row 1 holds '\\ud.*half of a surrogate pair"):
        list(find_documents(row, Data(), "row 1"))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + PLAIN


def test_a_template_that_does_not_end_is_stopped(
    learn: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 0.3)
    with pytest.raises(DataError, match=r"chat template did not end within 0\.3 seconds"):
        learn({"messages": [USER, CAT]}, ENDLESS)
    assert learn({"messages": [USER, CAT]})[1] == ["A cat.<|end|>"]


def test_a_template_that_takes_the_memory_is_stopped(
    learn: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "MEMORY", 64 << 20)
    monkeypatch.setattr(bounded, "MEMORY_AFTER_S", 0.0)
    endless = "{% for a in range(99999) %}{{ 'x' * 100000 ~ a }}{% endfor %}" + PLAIN
    with pytest.raises(DataError, match="chat template took more than"):
        learn({"messages": [USER, CAT]}, endless)


def test_a_table_may_hold_messages_as_json(learn: Learn) -> None:
    assert learn({"messages": json.dumps([USER, CAT])}) == learn({"messages": [USER, CAT]})


def test_a_conversation_of_parts_among_others(source_cache: SourceFactory) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source_cache("llama"))
    encoder = Encoder(tokenizer, Data(sequence_length=200))
    rows = [{"messages": [USER, CAT]}, {"messages": [{**USER, "content": parts("Hm?")}, CAT]}]
    documents = [d for row in rows for d in find_documents(row, Data(), "row")]
    first, second = encoder.encode(documents)
    assert first.scored is not None
    assert second.scored is not None
    assert first.ids[first.scored].tolist() == second.ids[second.scored].tolist()
