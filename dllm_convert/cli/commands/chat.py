"""`chat`: talk with a converted checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli import output
from dllm_convert.cli.commands import decoding
from dllm_convert.cli.commands.shared import draws, make_reporter
from dllm_convert.cli.errors import classify, tell_line
from dllm_convert.cli.types import path_of, seed_of
from dllm_convert.common.interruption import Interruption
from dllm_convert.common.shown_text import printable
from dllm_convert.errors import DataError, DllmConvertError, OutputError, RequestError

if TYPE_CHECKING:
    from dllm_convert.common.console import Reporter
    from dllm_convert.sampling.conversation import Chat

PROMPT = ">>> "

System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="What the model is to be.")
]
Load = Annotated[
    Path | None,
    typer.Option(
        "--load", metavar="FILE", parser=path_of, help="Go on with a conversation that /save wrote."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", parser=seed_of, metavar="N", help="Seed for temperatures above 0."),
]


@decoding.with_settings
def chat(
    checkpoint: option.CheckpointOrGguf,
    system: System = None,
    load: Load = None,
    settings: Any = None,
    seed: Seed = None,
    lossless: decoding.Lossless = False,
    base: decoding.VerifyingBase = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Talk with a converted checkpoint: a line asks, /help shows the commands, Ctrl-D ends.

    In a pipe every line of stdin is a question, and stdout has the answers.
    """
    reporter = make_reporter(quiet=quiet or as_json)
    decoding.check_here(checkpoint, settings, lossless=lossless, base=base)
    from dllm_convert.common.allocator import keep_freed_memory

    keep_freed_memory()
    with decoding.typed():
        talk, begun = _open(checkpoint, reporter, load, base, silent=as_json)
        if system is not None:
            begun = begun.under(system)
        begun = begun.decoded_with(**{**(talk.lossless if lossless else {}), **settings})
        if seed is not None:
            begun = begun.seeded(seed)
        talk.check(begun.settings)
    done = talk.hold(begun)
    if as_json:
        output.write_json(done.as_dict())


@dataclass
class Talk:
    """A person and a model.

    Attributes:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        reporter: What is said besides the answers.
        silent: Whether answers are not shown as they come.
        folder: Where the checkpoint lies, whose manifest names its base; None of a GGUF file.
        base: Who verifies in place of that base, as it was named; None for nobody.
        verifier: Another model that verifies, loaded once it is asked for.
    """

    model: Any
    tokenizer: Any
    reporter: Reporter
    silent: bool
    folder: Path | None
    base: str | None
    verifier: Any = None

    @property
    def at_terminal(self) -> bool:
        """Whether a person types, and sees the answers."""
        return sys.stdin.isatty() and sys.stdout.isatty()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that this model cannot be decoded with; load who verifies, if need be.

        Raises:
            DllmConvertError: There are such, or who verifies cannot be loaded.
        """
        from dllm_convert.sampling.pairing import settle

        base = self.verifier or self.base if settings.get("verify_with") == "base" else None
        settled = settle(self.model, settings, base=base, folder=self.folder)
        if settled.other is not None:
            self.verifier = settled.load(self.model, self.tokenizer, self.reporter)

    @property
    def lossless(self) -> dict[str, Any]:
        """The setting by which whoever verifies here is asked for."""
        from dllm_convert.sampling.checking import own_verifier, who_verifies

        own = own_verifier(self.model.config.to_dict())
        return who_verifies(own, {}, lossless=True, base=self.base)[0]

    @property
    def may_verify(self) -> str | None:
        """What `lossless` sets; None where nobody can verify what this model drafts."""
        from dllm_convert.common.manifest import MANIFEST_FILE
        from dllm_convert.sampling.checking import own_verifier, require_settings

        config, verifier = self.model.config.to_dict(), self.lossless["verify_with"]
        other = verifier == "base" and own_verifier(config) != "base"
        is_known = self.folder is not None and (self.folder / MANIFEST_FILE).is_file()
        if other and self.base is None and not is_known:
            return None
        if getattr(self.model, "reader", None) is not None and other:
            return None
        try:
            require_settings(self.model, self.lossless, other_verifies=other)
        except RequestError:
            return None
        return str(verifier)

    def hold(self, chat: Chat) -> Chat:
        """Answer every line there is, and return what was said."""
        for line in _lines(self.at_terminal):
            try:
                after = self._heed(chat, line)
            except DllmConvertError as error:
                # A script has to see a failure; a person says it otherwise.
                if not self.at_terminal or isinstance(error, OutputError):
                    raise
                self._tell(error)
                continue
            if after is None:
                break
            chat = after
        return chat

    def _heed(self, chat: Chat, line: str) -> Chat | None:
        """Do what a line says; None if it ends the chat."""
        from dllm_convert.sampling.commands import obey

        if not line.startswith("/"):
            return self._answered(chat.ask(line), before=chat)
        outcome = obey(chat, line, self.check, self.may_verify)
        for said in outcome.says:
            self.reporter.line(said)
        if outcome.ends:
            return None
        return self._answered(outcome.chat, before=chat) if outcome.replies else outcome.chat

    def _answered(self, asked: Chat, before: Chat) -> Chat:
        """Write an answer and show it; where it is given up, go back to what was before."""
        from dllm_convert.sampling.replies import Stopped, reply
        from dllm_convert.sampling.shown import sample_facts

        drawn = draws(self.reporter) and not self.silent
        pieces = None if drawn or self.silent else _written(sys.stdout.isatty())
        # The conversation says whether the base verifies; which that is says whoever opened it.
        other = self.verifier if asked.settings.get("verify_with") == "base" else None
        how: dict[str, Any] = {"draw": drawn, "write": pieces, "verifier": other}
        if not self.at_terminal:
            done = reply(self.model, self.tokenizer, asked, self.reporter, **how)
        else:
            with Interruption(gently=True) as stop:
                try:
                    done = reply(
                        *(self.model, self.tokenizer, asked, self.reporter),
                        stop=lambda: stop.requested,
                        **how,
                    )
                except Stopped:
                    if not stop.typed:
                        raise KeyboardInterrupt from None
                    if pieces is not None:
                        output.write("")
                    self.reporter.line("stopped; the question is taken back")
                    return before
        if drawn:
            output.write(done.turns[-1].content)
        elif not self.silent:
            output.write_piece("\n")
        self.reporter.line(sample_facts(done.turns[-1].facts), faint=True)
        return done

    def _tell(self, error: DllmConvertError) -> None:
        from dllm_convert.errors import spelt
        from dllm_convert.sampling.commands import as_commands

        known = classify(error)
        message = error.message if known is None else known.message
        hint = error.hint if known is None else known.hint
        if isinstance(error, RequestError):
            message = as_commands(spelt(error.message, str))
        tell_line("error", message if hint is None else f"{message}. {hint}")


def _open(
    checkpoint: str, reporter: Reporter, load: Path | None, base: str | None, *, silent: bool
) -> tuple[Talk, Chat]:
    """Load a checkpoint, and the conversation to go on with; say what it is."""
    from dllm_convert.common.json_files import load_json_object
    from dllm_convert.errors import DataError, IncompatibleError
    from dllm_convert.pipeline.api.writing import home_of, opened
    from dllm_convert.sampling.conversation import Chat
    from dllm_convert.sampling.shown import banner

    try:
        begun = Chat() if load is None else Chat.from_dict(load_json_object(load), str(load))
    except DataError as error:
        # Whatever is wrong with it: it is no download, and no file to be written by hand.
        raise DataError(error.message, hint="Give a file that /save wrote") from error
    model, tokenizer, manifest = opened(checkpoint, reporter)
    if not tokenizer.chat_template:
        raise IncompatibleError(
            "the tokenizer has no chat template, so this is no model to talk with",
            hint=f"dllm-convert sample {checkpoint} --prompt TEXT goes on from a text",
        )
    talk = Talk(model, tokenizer, reporter, silent, home_of(checkpoint), base)
    for line in banner(Path(checkpoint).name, manifest):
        reporter.line(line)
    if talk.at_terminal:
        reporter.line("/help shows the commands, Ctrl-D ends")
    return talk, begun


def _written(at_terminal: bool) -> Callable[[str], None]:
    """Return what shows pieces of an answer: nothing in them acts on a terminal."""
    return (lambda text: output.write_piece(printable(text))) if at_terminal else output.write_piece


def _lines(at_terminal: bool) -> Iterator[str]:
    """Yield what is typed, without empty lines; a backslash at a line's end goes on below.

    Raises:
        DataError: It is not UTF-8.
    """
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history
    held = ""
    while True:
        try:
            typed_line = _typed(held) if at_terminal else _read()
        except EOFError:
            return
        if typed_line.endswith("\\"):
            held += typed_line[:-1] + "\n"
            continue
        line, held = held + typed_line, ""
        if line.strip():
            yield line


def _typed(held: str) -> str:
    return input("... " if held else PROMPT)


def _read() -> str:
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError("the message on stdin is not UTF-8", hint="Convert it first") from error
