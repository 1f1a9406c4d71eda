"""The one place that turns a failure into a line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup

from dllm_convert.cli.guide import meant
from dllm_convert.cli.output import write_json
from dllm_convert.common.disk import DISK_FULL
from dllm_convert.common.interruption import INTERRUPTED, Interruption
from dllm_convert.common.quiet import debugging
from dllm_convert.common.ranks import Rank, lost_process
from dllm_convert.common.secrets_found import TOKEN_VARIABLES
from dllm_convert.common.shown_text import one_line
from dllm_convert.errors import DllmConvertError, OutputError, RequestError, spelt

UsageError: Any = typer.BadParameter.__base__
"""What click raises for a wrong command line; some versions of typer bring a click of their own."""
JSON_KEY = "dllm_convert.json"
"""Entry of the context's shared `meta` that says whether stdout is to hold JSON."""

_ARGUMENTS = "dllm_convert.arguments"
"""Entry that holds what was typed: an option that is wrong is refused before `--json` is read."""

_FLAGS = {
    "overrides": "--set",
    "settings": "--set",
    "source": "SOURCE",
    "train=False": "--no-train",
    "page": "--report",
}
"""Arguments of Python that the command line calls otherwise than by their name."""
_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What torch says on a CPU, in an ordinary RuntimeError."""
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


@dataclass(frozen=True)
class Failure:
    """What is said of an error, and how the process ends."""

    kind: str
    message: str
    hint: str | None
    exit_code: int = 1


class CommandGroup(TyperGroup):
    """The application's commands, with known failures caught around every one of them."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; known failures become one line and their exit code."""
        try:
            with Interruption(gently=False, farewell=lambda: _say(_interrupted(ctx), ctx)):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _exit(_interrupted(ctx), error, ctx) from error
        except UsageError as error:
            # Shown in a box: what is quoted in it must not draw over that.
            error.message = one_line(error.message)
            if ctx.meta.get(JSON_KEY) or "--json" in ctx.meta.get(_ARGUMENTS, ()):
                _document(Failure("UsageError", error.format_message(), None, error.exit_code))
            raise
        except (DllmConvertError, MemoryError, OSError, RuntimeError) as error:
            known = classify(error)
            if known is None:
                raise
            raise _exit(known, error, ctx) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; what is called otherwise elsewhere is named as it is called here."""
        try:
            return super().resolve_command(ctx, args)
        except UsageError as error:
            near = meant(args[0], self.commands) if args else None
            if near is None:
                raise
            raise UsageError(f"No such command '{args[0]}'. Did you mean '{near}'?", ctx) from error

    def make_context(
        self, info_name: Any, args: list[str], parent: Any = None, **options: Any
    ) -> Any:
        """Parse the command line; `--help` and `--version` are answered here."""
        given = tuple(args)
        try:
            context = super().make_context(info_name, args, parent, **options)
            context.meta[_ARGUMENTS] = given
            return context
        except OutputError as error:
            tell_line("error", str(error))
            raise typer.Exit(error.exit_code) from error


def flag(name: str) -> str:
    """Return an argument of Python, or one with its value, as the command line has it."""
    if name in _FLAGS:
        return _FLAGS[name]
    argument, _, value = name.partition("=")
    return f"--{argument.replace('_', '-')} {value}".rstrip()


def classify(error: Exception) -> Failure | None:
    """Return what to say of an error, or None if it is a bug or none of ours."""
    if isinstance(error, DllmConvertError):
        message, hint = error.message, error.hint
        if isinstance(error, RequestError):
            message, hint = spelt(message, flag), hint and spelt(hint, flag)
        return Failure(type(error).__name__, message, hint, error.exit_code)
    lost = lost_process(error)
    if lost is not None:
        return Failure("LostProcess", lost.message, lost.hint, lost.exit_code)
    # torch.OutOfMemoryError is a RuntimeError; naming it would import torch.
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or _CPU_MEMORY in str(error):
        hint = "Lower --set training.batch_size=1 or data.sequence_length, or train with --lora 16"
        return Failure("OutOfMemory", "there is not enough memory", hint)
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return _classify_os(error)
    return None


def redact(text: str) -> str:
    """Return the text without access tokens, known ones and whatever looks like one."""
    for variable in TOKEN_VARIABLES:
        token = os.environ.get(variable)
        if token:
            text = text.replace(token, "hf_***")
    return _TOKEN.sub("hf_***", text)


def _classify_os(error: OSError) -> Failure:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in DISK_FULL:
        hint = (
            "Free some space or give an --out on another disk; the same command goes on from here"
        )
        return Failure("DiskFull", f"the disk is full while writing{where}", hint)
    if isinstance(error, PermissionError):
        return Failure("PermissionDenied", f"no permission for{where}", "Give another path")
    problem = error.strerror or str(error) or type(error).__name__
    hint = "HF_DEBUG=1 shows where this comes from"
    return Failure(type(error).__name__, f"{problem}{where}", None if debugging() else hint)


def _interrupted(ctx: Any) -> Failure:
    resumable = ctx.invoked_subcommand in ("run", "push", "evaluate")
    hint = "The same command goes on where it stopped" if resumable else None
    return Failure("Interrupted", "interrupted", hint, INTERRUPTED)


def _exit(failure: Failure, error: BaseException, ctx: Any) -> typer.Exit:
    if debugging():
        tell(redact("".join(traceback.format_exception(error))))
    _say(failure, ctx)
    return typer.Exit(failure.exit_code)


def _say(failure: Failure, ctx: Any) -> None:
    if failure.exit_code == INTERRUPTED and not Rank.from_environment().main:
        return  # All were told to end; the first says so.
    message = failure.message if failure.hint is None else f"{failure.message}. {failure.hint}"
    tell_line("error", message)
    if ctx.meta.get(JSON_KEY):
        _document(failure)


def _document(failure: Failure) -> None:
    """Write a failure as the one document of a command that was asked for one."""
    hint = redact(failure.hint) if failure.hint is not None else None
    problem = {"kind": failure.kind, "message": redact(failure.message), "hint": hint}
    with suppress(OutputError):
        write_json({"error": problem, "exit_code": failure.exit_code})


def tell_line(kind: str, text: str) -> None:
    """Write what is to be known to stderr, as one line whatever names and values it holds.

    Args:
        kind: What stands in front, `error` or `warning`.
        text: Message and hint.
    """
    tell(f"{kind}: {one_line(redact(text))}\n")


def tell(text: str) -> None:
    """Write to stderr, if somebody still reads it."""
    with suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
