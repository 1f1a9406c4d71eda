"""What a chat template makes of messages, or why it makes nothing of them.

A template is a program that came with the checkpoint: whatever it raises, and an end that it does
not come to, is its fault and is told as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jinja2

from dllm_convert.common.bounded import BoundError, bounded
from dllm_convert.errors import DataError

REFUSED = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    # A template is compiled to Python: `{% break %}` outside of a loop is no error of jinja2's.
    SyntaxError,
    NameError,
    AssertionError,
    RuntimeError,
)
"""What a template can raise that takes other messages, or is broken."""
T = TypeVar("T")


def explained(render: Callable[[], T], where: str, hint: str, *, endless: str) -> T:
    """Call what renders a chat template.

    Args:
        render: The call.
        where: What it is given, for the message.
        hint: What to do where the template refuses that.
        endless: What to do where it does not end.

    Raises:
        DataError: The template refuses it, or does not end.
    """
    try:
        return bounded(render)
    except BoundError as error:
        raise DataError(f"the chat template {error} on {where}", hint=endless) from error
    except REFUSED as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"the chat template refuses {where} ({reason})", hint=hint) from error


def chat_text(
    tokenizer: Any, messages: Sequence[dict[str, Any]], where: str, hint: str, **options: Any
) -> str:
    """Return messages as a tokenizer's chat template writes them.

    Args:
        tokenizer: A tokenizer of transformers that has a template.
        messages: Turns.
        where: What they are, for the message.
        hint: What to do where the template refuses them.
        **options: Other arguments of `apply_chat_template`.

    Raises:
        DataError: The template refuses them, or does not end.
    """

    def render() -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    return explained(render, where, hint, endless=hint)
