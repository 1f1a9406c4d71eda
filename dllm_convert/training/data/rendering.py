"""A chat template, and that what goes into it comes out of it.

Templates take content as a text or as parts, arguments of a call as an object or as JSON, and pass
over roles and keys that they do not know. Nothing of that is an error to them. So the form is the
first in which everything that a conversation says is found in what the template makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, TypeVar

from dllm_convert.errors import DataError
from dllm_convert.source.chat_rendering import explained
from dllm_convert.training.data.forms import Form, function_of, pieces
from dllm_convert.training.data.messages import Conversation, Message

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_CALLED = {"developer": "system", "observation": "tool", "function": "tool", "ipython": "tool"}
_CALLED |= {"tool_response": "tool", "function_response": "tool"}
_KNOWN = ("system", "user", "assistant", "tool")

T = TypeVar("T")


@dataclass(frozen=True)
class Rendered:
    """What a template made of a conversation.

    Attributes:
        messages: The conversation in the form in which the template takes it.
        tools: What the assistant may call.
        text: The rendering.
        marked: Ranges of characters inside `{% generation %}`; None where the template has none.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...]
    text: str
    marked: tuple[tuple[int, int], ...] | None


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: It has a template.
    """

    tokenizer: Any
    _form: Form = field(default_factory=Form)
    _kept: dict[tuple[Any, ...], int | None] = field(default_factory=dict)

    @cached_property
    def source(self) -> str:
        """The template."""
        return str(self.tokenizer.get_chat_template())

    @cached_property
    def marks(self) -> bool:
        """Whether it marks what the assistant writes with `{% generation %}`."""
        return bool(_GENERATION.search(self.source))

    def fit(self, conversation: Conversation, where: str) -> Rendered:
        """Render a conversation in the form in which nothing of it is lost.

        Args:
            conversation: What is said; `mark` of `plain_text` may stand in it.
            where: What an error calls it.

        Raises:
            DataError: If the template refuses it, or loses part of it in every form.
        """
        messages = [
            self.with_role(message, f"{where}, message {i}")
            for i, message in enumerate(conversation, 1)
        ]
        calls = any("tool_calls" in message for message in messages)
        problems: list[DataError] = []
        for form in self._forms(calls=calls):
            said = Conversation([form.of(message) for message in messages], conversation.tools)
            try:
                rendered = self._render(said, where)
            except DataError as error:
                problems.append(error)
                continue
            lost = self._lost(messages, rendered, where)
            if lost is None:
                self._form = form
                return rendered
            problems.append(lost)
        raise problems[0]

    def _forms(self, *, calls: bool) -> list[Form]:
        """Return the forms to try, the one that went well before first."""
        both = (False, True)
        known = self._form if calls else Form(self._form.parts)
        ways = product(both, both, both) if calls else product((False,), (False,), both)
        forms = [Form(parts, written, blank) for written, blank, parts in ways]
        return sorted(forms, key=lambda form: form != known)

    def with_role(self, message: Message, where: str) -> Message:
        """Give a message the role that the template knows it by.

        Raises:
            DataError: If it knows none for it.
        """
        role = message["role"]
        if role in _KNOWN or self._names(role):
            return message
        if role.lower() in _CALLED:
            return {**message, "role": _CALLED[role.lower()]}
        raise DataError(
            f"{where} has the role {role!r}, which the chat template does not know",
            hint=f"Roles are {', '.join(_KNOWN)}: rename it, or remove that conversation",
        )

    def _names(self, role: str) -> bool:
        return f'"{role}"' in self.source or f"'{role}'" in self.source

    def render(self, messages: Sequence[Message], where: str, **options: Any) -> str:
        """Return what the template makes of messages.

        Raises:
            DataError: If it refuses them or does not end.
        """
        said = [dict(message) for message in messages]
        return str(self._explained(lambda: self._apply(said, options), where))

    def _apply(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Any:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _render(self, said: Conversation, where: str) -> Rendered:
        tools = list(said.tools) or None
        if not self.marks:
            text = self.render(said, where, tools=tools)
            return Rendered(said, said.tools, text, None)
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = self._explained(
            lambda: render_jinja_template(
                conversations=[[dict(message) for message in said]],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            ),
            where,
        )
        texts, spans = rendered
        return Rendered(said, said.tools, texts[0], tuple((start, end) for start, end in spans[0]))

    def _explained(self, call: Callable[[], T], where: str) -> T:
        return explained(
            call,
            where,
            "Correct or remove that conversation: the template says which order of roles "
            "and which kinds of content it takes",
            endless="Correct the base's chat_template.jinja, or remove that conversation",
        )

    def _lost(
        self, messages: Sequence[Message], rendered: Rendered, where: str
    ) -> DataError | None:
        """Find the first message that the rendering does not hold, in their order."""
        text = rendered.text
        for tool in rendered.tools:
            name = str(function_of(tool).get("name", ""))
            if name not in text:
                return DataError(
                    f"the chat template drops the tools of {where}, of them {name!r}",
                    hint="Take a base whose template shows tools, or remove that column",
                )
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        at, dropped = 0, self._dropped(messages, rendered.messages)
        for i, message in enumerate(messages):
            end = at
            for what, piece in pieces(message, answers=i > asked):
                found = -1 if i == dropped else text.find(piece, at)
                if found < 0:
                    return DataError(
                        f"the chat template drops {what} of {where}, message {i + 1} "
                        f"({message['role']})",
                        hint="Write it in a way that the template takes, remove that conversation, "
                        "or take a base whose template knows it",
                    )
                end = max(end, found + len(piece))
            at = end
        return None

    def _dropped(self, messages: Sequence[Message], said: Sequence[Message]) -> int | None:
        """Find a message that is dropped whatever it says, by words that nothing else says."""
        parts = any(isinstance(message.get("content"), list) for message in said)
        spoken = [bool((message.get("content") or "").strip()) for message in messages]
        calls = [len(message.get("tool_calls", ())) for message in messages]
        roles = [message["role"] for message in messages]
        shape = (parts, *zip(roles, spoken, calls, strict=True))
        if shape not in self._kept:
            words = [f"message{i}said" for i in range(len(messages))]
            probe = [
                {**message, "content": [{"type": "text", "text": word}] if parts else word}
                if speaks
                else message
                for message, word, speaks in zip(said, words, spoken, strict=True)
            ]
            self._kept[shape] = self._first_without(probe, words, spoken)
        return self._kept[shape]

    def _first_without(
        self, probe: Sequence[Message], words: Sequence[str], spoken: Sequence[bool]
    ) -> int | None:
        try:
            text = self.render(probe, "a conversation of the same roles")
        except DataError:
            return None  # It is particular about what is said; the real words are looked for.
        heard = ((i, word) for i, word in enumerate(words) if spoken[i])
        return next((i for i, w in heard if w not in text or _written_out(text, w)), None)


def _written_out(text: str, word: str) -> bool:
    """Whether a part appears as Python or JSON writes it, instead of by its text."""
    return bool(re.search(rf"""['"]text['"]\s*:\s*['"]{word}""", text))
