"""What a chat template ends a turn of the assistant with, found by rendering one.

transformers renders templates too, but takes its second of imports, which a conversion that loads
no model does without. The sandbox and the names a template may use are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dllm_convert.common.bounded import BoundError, bounded
from dllm_convert.common.foreign_files import read_text
from dllm_convert.source.chat_rendering import REFUSED
from dllm_convert.source.safetensors_header import load_json_object

SAID = "Seven small stones."
"""What the assistant says in the conversation that is rendered."""
_CONVERSATIONS = (
    ("user", "assistant", "user"),
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("assistant",),
)


class _Generation(Extension):
    """`{% generation %}` as training's templates mark what the assistant wrote: text like any."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


def _render(template: str, **facts: Any) -> str:
    return _environment().from_string(template).render(**facts)


def read_template(folder: Path) -> str | None:
    """Return the chat template of a checkpoint folder as transformers would choose it.

    Raises:
        DataError: The file is not UTF-8, or no file.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        content = load_json_object(folder / name) if (folder / name).is_file() else {}
        found = content.get("chat_template")
        if isinstance(found, list):
            named = {
                item.get("name"): item.get("template") for item in found if isinstance(item, dict)
            }
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def turn_end(template: str, named: Mapping[str, str], special: Collection[str]) -> str | None:
    """Return the special token that a template puts behind what the assistant said.

    Args:
        template: The chat template.
        named: Names that templates use, such as `eos_token`, to the tokens' texts.
        special: Texts of all special tokens.

    Returns:
        Its text; None if there is none, or the template does not render.
    """
    listed = sorted((text for text in special if text), key=len, reverse=True)
    if not listed:
        return None
    mark = re.compile(rf"{re.escape(SAID)}\s*({'|'.join(map(re.escape, listed))})")
    for roles in _CONVERSATIONS:
        messages = [
            {"role": role, "content": SAID if role == "assistant" else "Say something."}
            for role in roles
        ]
        facts: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": False}
        try:
            text = bounded(partial(_render, template, messages=messages, **facts, **named))
        except BoundError:
            return None
        except REFUSED:
            continue
        found = mark.search(text)
        if found is not None:
            return found[1]
    return None
