"""Conversations in a dataset's columns: which there are, and what their messages say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dllm_convert.errors import DataError

Message = Mapping[str, Any]

CHAT_COLUMNS: tuple[frozenset[str], ...] = (
    frozenset({"messages"}),
    frozenset({"conversations"}),
    frozenset({"prompt", "completion"}),
    frozenset({"instruction", "output"}),
)
"""Columns that hold a conversation where nothing else is named."""
_SYSTEM = ("system", "system_prompt", "system_message")
BESIDE_CHATS = frozenset({*_SYSTEM, "tools", "functions", "input", "history"})
"""Columns that belong to a conversation where there is one."""
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_CALLS = ("function_call", "tool_call")
_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("input", "output"),
    ("query", "answer"),
    ("problem", "solution"),
)
_LEARNT = ("weight", "loss", "train", "training")
"""What trainers call whether an answer is learnt from: OpenAI, ms-swift and axolotl."""
_LOOKS_LIKE = 'Messages look like {"role": "user", "content": "..."}'
_ANOTHER_COLUMN = "Name the right column with --set data.text_field=COLUMN"


class Conversation(tuple[Message, ...]):
    """Messages, with the tools that the assistant may call.

    A message has a `role`; a `content` that is a text, a `tool_calls`, or both; the `weight` 0 if
    it is not to be learnt from; and whatever else the row says.
    """

    tools: tuple[Any, ...]

    def __new__(cls, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Conversation:
        """Join messages and tools."""
        self = super().__new__(cls, messages)
        self.tools = tuple(tools)
        return self


def find_messages(row: Mapping[str, Any], field: str, where: str) -> Conversation | None:
    """Return the conversation in a row, None if it has none.

    Args:
        row: Its columns.
        field: Column that may hold messages; the usual ones are looked at if it is missing.
        where: What an error calls the row.

    Raises:
        DataError: If there is a conversation without roles or content, or with content that is no
            text.
    """
    turns = _turns(row, field, where)
    if turns is None:
        return None
    named = ((name, row.get(name)) for name in _SYSTEM)
    for name, system in named:
        if not isinstance(system, str) or not system.strip():
            continue
        first = turns[0] if turns else {}
        if first.get("role") != "system":
            turns = ({"role": "system", "content": system}, *turns)
        elif first.get("content") != system:
            raise DataError(
                f"{where} has a column {name} and another message of the role system",
                hint="Keep one of them",
            )
    return Conversation(turns, _tools(row, where))


def _turns(row: Mapping[str, Any], field: str, where: str) -> tuple[Message, ...] | None:
    for name in (field, "messages", "conversations"):
        if row.get(name) is not None:
            return _messages(row[name], where)
    for asked, answered in (("prompt", "completion"), ("instruction", "output")):
        question, answer = row.get(asked), row.get(answered)
        if question is not None and answer is not None:
            if asked == "instruction" and isinstance(question, str):
                question = _instruction(question, row.get("input"), where)
            history = _history(row.get("history"), where) if asked == "instruction" else ()
            return (*history, *_turn(question, "user", where), *_turn(answer, "assistant", where))
    return None


def _instruction(question: str, given: Any, where: str) -> str:
    """Alpaca's instruction, followed by its input if there is one."""
    if given is not None and not isinstance(given, str):
        raise DataError(
            f"{where} has an input that is a {type(given).__name__}, expected a text",
            hint="Beside instruction and output, input is the text that the instruction is about",
        )
    return f"{question}\n{given}" if given and given.strip() else question


def _history(value: Any, where: str) -> tuple[Message, ...]:
    """Earlier turns of an Alpaca row: pairs of a question and its answer."""
    if not value:
        return ()
    pairs = value if isinstance(value, Sequence) and not isinstance(value, str) else (None,)
    turns: list[Message] = []
    for pair in pairs:
        if not (
            isinstance(pair, Sequence)
            and len(pair) == 2
            and all(isinstance(side, str) for side in pair)
        ):
            raise DataError(
                f"{where} has a history that is no list of pairs of texts",
                hint="Beside instruction and output, history holds [question, answer] pairs",
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return tuple(turns)


def advice(columns: Sequence[str]) -> str:
    """Say what to do about a row in which neither text nor a conversation was found."""
    names = {*columns}
    if {"instruction", "context", "response"} <= names:
        return (
            "To learn the answer: --set data.columns.instruction=instruction "
            "--set data.columns.input=context --set data.columns.output=response; or one column "
            "as plain text: --set data.text_field=response"
        )
    if {"chosen", "rejected"} <= names:
        return (
            "Preferences are not trained on; learn from the preferred side with "
            "--set data.text_field=chosen"
        )
    for question, answer in _PAIRS:
        if {question, answer} <= names:
            return (
                f"To learn the answer: --set data.columns.prompt={question} "
                f"--set data.columns.completion={answer}; or one column as plain text: "
                f"--set data.text_field={answer}"
            )
    return "Name the column of the text or of the messages with --set data.text_field=COLUMN"


def _turn(value: Any, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return _messages(value, where)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, Mapping):
        # A list of structs as older datasets store it: a struct of lists.
        lists = {key: items for key, items in value.items() if isinstance(items, Sequence)}
        value = [dict(zip(lists, items, strict=False)) for items in zip(*lists.values())]  # noqa: B905
    if isinstance(value, str) and value.lstrip().startswith("["):
        # Tables of text hold lists as JSON.
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise DataError(
            f"{where} holds a {type(value).__name__}, expected a text or a list of messages",
            hint=_ANOTHER_COLUMN,
        )
    return tuple(_message(message, f"{where}, message {i}") for i, message in enumerate(value, 1))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where} is a {type(message).__name__}, expected an object with role and content",
            hint=_ANOTHER_COLUMN,
        )
    given = {key: value for key, value in message.items() if value is not None}
    role = given.pop("role", None) or given.pop("from", None)
    content = given.pop("content", None)
    content = given.pop("value", None) if content is None else content
    calls = _calls(given)
    if not isinstance(role, str) or (content is None and not calls):
        missing = "role" if not isinstance(role, str) else "content"
        there = sorted(key for key, value in message.items() if value is not None)
        raise DataError(f"{where} has no {missing}, it has {there}", hint=_LOOKS_LIKE)
    lower = role.strip().lower()
    if lower in _CALLS:
        role, content, calls = "assistant", None, [_written_call(content, f"{where} ({role})")]
    elif lower in (*_ROLES, "user", "assistant", "system", "tool"):
        role = _ROLES.get(lower, lower)
    where = f"{where} ({role})"
    _check_weight(given, where)
    found: dict[str, Any] = {**given, "role": role}
    if calls:
        found["tool_calls"] = calls
    return found if content is None else {**found, "content": _text(content, where)}


def _calls(given: dict[str, Any]) -> list[Any]:
    """Take the tool calls out of a message, in OpenAI's present form or its older one."""
    calls = given.pop("tool_calls", None) or []
    single = given.pop("function_call", None)
    if isinstance(single, Mapping) and single.get("name"):
        calls = [*calls, {"type": "function", "function": dict(single)}]
    return [without_nulls(call) for call in calls]


def _written_call(content: Any, where: str) -> dict[str, Any]:
    """Read a call that is written as a message of its own (ShareGPT)."""
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except (json.JSONDecodeError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise DataError(
            f'{where} is no call of a tool, expected {{"name": ..., "arguments": {{...}}}}',
            hint="Write the call that way, or as tool_calls of a message of the assistant",
        )
    return {"type": "function", "function": dict(call)}


def _check_weight(given: dict[str, Any], where: str) -> None:
    """Take out whether an answer is to be learnt: 1 or true, or else 0 or false."""
    learnt = True
    for name in _LEARNT:
        if not isinstance(given.get(name), int | float):
            continue
        weight = given.pop(name)
        if weight not in (0, 1):
            raise DataError(
                f"{where} has the {name} {weight!r}, expected 0 or 1",
                hint="A message is learnt from or it is not: 0 leaves it out of the loss",
            )
        learnt = learnt and bool(weight)
    if not learnt:
        given["weight"] = 0


def _text(content: Any, where: str) -> str:
    """Return a message's text; parts follow each other with nothing between them."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise DataError(
            f"{where} has a content that is a {type(content).__name__}, expected a text",
            hint=_LOOKS_LIKE,
        )
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
    kind = given.get("type", "text")
    if kind in ("text", "input_text", "output_text") and isinstance(given.get("text"), str):
        return str(given["text"])
    what = f"of the type {kind!r}" if given else f"that is a {type(part).__name__}"
    if given and "text" not in given and kind == "text":
        what = f"of {sorted(given)}"
    raise DataError(
        f"{where} has a part {what}, expected text",
        hint="Only text is trained on: remove rows with images, audio and the like",
    )


def _tools(row: Mapping[str, Any], where: str) -> list[Any]:
    """Return the tools that stand in a column of their own, as objects or as JSON."""
    for name in ("tools", "functions"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{where} has a column {name} that is not JSON",
                    hint="It holds a list of functions that the assistant may call",
                ) from error
        if not value or isinstance(value, str):
            continue
        tools = [value] if isinstance(value, Mapping) else value
        if not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools):
            raise DataError(
                f"{where} has a column {name} that is no list of objects",
                hint="It holds a list of functions that the assistant may call",
            )
        bare = [without_nulls(tool) for tool in tools]
        return [t if "function" in t else {"type": "function", "function": t} for t in bare]
    return []


def without_nulls(value: Any) -> Any:
    """Leave out the keys that a table gives every struct, with null where there was none."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
