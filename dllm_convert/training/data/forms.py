"""How a message is written for a template, and what has to be found of it afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dllm_convert.training.data.messages import Message

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_CLOSES_THOUGHT = "</think>"


@dataclass(frozen=True)
class Form:
    """How messages are written for a template.

    Attributes:
        parts: Whether content is a list of parts instead of a text.
        written: Whether the arguments of a call are JSON instead of an object.
        blank: Whether a message that only calls has an empty content instead of none.
    """

    parts: bool = False
    written: bool = False
    blank: bool = False

    def of(self, message: Message) -> dict[str, Any]:
        """Return a message in this form."""
        found = {key: value for key, value in message.items() if key != "weight"}
        if "tool_calls" in found:
            found["tool_calls"] = [self._call(call) for call in found["tool_calls"]]
            if not (found.get("content") or "").strip():
                return {**found, "content": "" if self.blank else None}
        if self.parts:
            found["content"] = [{"type": "text", "text": found["content"]}]
        return found

    def _call(self, call: Any) -> Any:
        function = function_of(call)
        arguments = _arguments(function)
        if self.written and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        rest = {**call} if "function" in call else {"type": "function"}
        return {**rest, "function": {**function, "arguments": arguments}}


def function_of(call: Any) -> Mapping[str, Any]:
    """Return what a call calls, or what a tool is: an object with a name."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}


def _arguments(function: Mapping[str, Any]) -> Any:
    """Return the arguments of a call as an object, where they are one or JSON of one."""
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def pieces(message: Message, *, answers: bool = False) -> Iterator[tuple[str, str]]:
    """Yield what has to be found of a message: what it is, and its text.

    A thought of an earlier turn is not: templates of models that think drop it on purpose.
    """
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    if message["role"] == "assistant" and _CLOSES_THOUGHT in content:
        thought, _, content = content.rpartition(_CLOSES_THOUGHT)
        thought = thought.rpartition("<think>")[2].strip()
        if answers and thought:
            yield "the thought", thought
    if answers and message["role"] == "assistant":
        for key in _THOUGHTS:
            if isinstance(message.get(key), str) and message[key].strip():
                yield f"the {key}", message[key].strip()
    if content.strip():
        yield "the content", content.strip()
    for call in message.get("tool_calls", ()):
        function = function_of(call)
        yield "the call", str(function.get("name", ""))
        for leaf in _leaves(_arguments(function)):
            yield "an argument of the call", leaf


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        # Inside JSON, quotes and line breaks are written otherwise.
        yield from re.findall(r"[^\s\"\\/<>&']+", value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
