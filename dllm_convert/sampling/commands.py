"""What somebody types in a chat that begins with a slash: a conversation in, another one out."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.counts import LARGEST_COUNT
from dllm_convert.common.disk import write_whole
from dllm_convert.common.strict_json import dumps
from dllm_convert.errors import RequestError
from dllm_convert.recipe.decoding import SETTINGS, Setting
from dllm_convert.sampling.conversation import Chat

OFF, SAVED = ("off", "none"), "default"
"""What switches a setting off, whatever the checkpoint has saved, and what leaves it to that."""
_NAMES = {
    (setting.flag or f"--{name.replace('_', '-')}").removeprefix("--"): name
    for name, setting in SETTINGS.items()
    if name != "verify_with"
}
"""Settings by what they are called on the command line."""
_SAYS = {
    "regen": "writes the last answer anew",
    "undo": "takes the last question and answer back",
    "clear": "begins anew",
    "system": "TEXT says what the model is to be; alone, nothing",
    "lossless": "on|off: writes what autoregressive decoding would, and denoises only to draft it",
    "save": "FILE keeps the conversation, for chat --load FILE",
    "settings": "shows what is set",
    "help": "shows this",
    "quit": "ends, as Ctrl-D does",
}


@dataclass(frozen=True)
class Outcome:
    """What comes of a command.

    Attributes:
        chat: The conversation after it.
        says: What the person is told, line by line.
        replies: Whether an answer is to be written now.
        ends: Whether the chat is over.
    """

    chat: Chat
    says: tuple[str, ...] = ()
    replies: bool = False
    ends: bool = False


def obey(
    chat: Chat, line: str, check: Callable[[Mapping[str, Any]], None], verifier: str | None
) -> Outcome:
    """Do what a line says that begins with a slash.

    Args:
        chat: The conversation.
        line: What was typed.
        check: Raises a RequestError for settings that the model cannot be decoded with.
        verifier: The verifier of lossless decoding, None where there is none.

    Raises:
        RequestError: There is no such command, or it cannot be done.
    """
    name, _, rest = line.strip().removeprefix("/").partition(" ")
    name, rest = name.lower(), rest.strip()
    if name in _NAMES:
        return _set(chat, _NAMES[name], rest, check)
    if name in _PLAIN:
        return _PLAIN[name](chat, rest)
    if name == "lossless":
        return _lossless(chat, rest, check, verifier)
    if name == "help":
        return Outcome(chat, _help(verifier))
    near = difflib.get_close_matches(name, [*_NAMES, *_SAYS], n=1)
    raise RequestError(
        f"there is no /{name}", hint=f"Did you mean /{near[0]}?" if near else "/help shows all"
    )


def as_commands(text: str) -> str:
    """Return a text with commands in place of the names that decoding has for settings."""
    by_name = {name: command for command, name in _NAMES.items()} | {"verify_with": "lossless"}
    return re.sub(rf"\b({'|'.join(by_name)})\b", lambda found: f"/{by_name[found[1]]}", text)


def _set(chat: Chat, name: str, text: str, check: Callable[[Mapping[str, Any]], None]) -> Outcome:
    if text.lower() == SAVED:
        changed = chat.decoded_as_saved(name)
    else:
        value = None if text.lower() in OFF else _value(name, SETTINGS[name], text)
        changed = chat.decoded_with(**{name: value})
    check(changed.settings)
    return Outcome(changed, (_settings(changed),))


def _value(name: str, setting: Setting, text: str) -> Any:
    """Read a setting's value.

    Raises:
        RequestError: It is none.
    """
    try:
        if setting.kind == "switch" and text.lower() in ("", "on"):
            return True
        if setting.kind == "choice" and text in setting.choices:
            return text
        if setting.kind == "count" and 1 <= int(text) <= LARGEST_COUNT:
            return int(text)
        if setting.kind == "number" and 0 <= float(text) <= (setting.most or sys.float_info.max):
            return float(text)
    except ValueError:
        pass
    most = f" to {setting.most:g}" if setting.most else " on"
    expected = {
        "switch": "on or off",
        "choice": f"{', '.join(setting.choices)} or off",
        "count": "a whole number from 1 on, or off",
        "number": f"a number from 0{most}, or off",
    }
    raise RequestError(f"{name} is {text[:40]!r}, expected {expected[setting.kind]}")


def _lossless(
    chat: Chat, text: str, check: Callable[[Mapping[str, Any]], None], verifier: str | None
) -> Outcome:
    if verifier is None:
        raise RequestError(
            "this checkpoint has no verifier",
            hint="Preset lossless, or keep-base, trains one that has; or begin the chat "
            "losslessly, with a base that is named",
        )
    if text.lower() not in ("", "on", "off"):
        raise RequestError(f"lossless is {text[:40]!r}, expected on or off")
    changed = chat.decoded_with(verify_with=None if text.lower() == "off" else verifier)
    check(changed.settings)
    return Outcome(changed, (_settings(changed),))


def _same_again(chat: Chat) -> tuple[str, ...]:
    drawn = chat.settings.get("temperature")
    return () if drawn else ("nothing is drawn, so it may be the same: /temperature 0.8 draws",)


def _settings(chat: Chat) -> str:
    shown = [
        f"{name} {'off' if value is None else value}"
        for name, value in sorted(chat.settings.items())
    ]
    return as_commands(", ".join(shown) or "the checkpoint's own settings")


def _save(chat: Chat, name: str) -> Path:
    """Write the conversation into a new file.

    Raises:
        RequestError: It cannot be written.
    """
    if not name:
        raise RequestError("/save takes the name of a file")
    path = Path(name).expanduser()
    if path.exists():
        raise RequestError(f"{path} is there already", hint="Give another name")
    try:
        write_whole(path, dumps(chat.as_dict(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror})") from error
    return path


_PLAIN: Mapping[str, Callable[[Chat, str], Outcome]] = {
    "regen": lambda chat, _: Outcome(chat.reopen(), _same_again(chat), replies=True),
    "undo": lambda chat, _: Outcome(chat.undo(), ("taken back",)),
    "clear": lambda chat, _: Outcome(chat.emptied(), ("begun anew",)),
    "system": lambda chat, text: Outcome(
        chat.under(text), (f"system: {text}" if text else "no system message",)
    ),
    "save": lambda chat, name: Outcome(chat, (f"saved in {_save(chat, name)}",)),
    "settings": lambda chat, _: Outcome(chat, (_settings(chat),)),
    "quit": lambda chat, _: Outcome(chat, ends=True),
    "exit": lambda chat, _: Outcome(chat, ends=True),
}
"""Commands that need nothing but the conversation."""


def _help(verifier: str | None) -> tuple[str, ...]:
    own = {name: says for name, says in _SAYS.items() if verifier or name != "lossless"}
    first = {
        command: f"{SETTINGS[name].metavar} {SETTINGS[name].says}"
        for command, name in _NAMES.items()
        if SETTINGS[name].panel is None
    }
    rest = ", ".join(f"/{command}" for command, n in _NAMES.items() if SETTINGS[n].panel)
    lines = [f"/{name.ljust(15)} {says}" for name, says in (first | own).items()]
    return (*lines, f"also {rest}; off leaves a setting to the checkpoint")
