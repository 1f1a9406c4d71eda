"""Write the model's next answer in a conversation, and hand it on while it is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from dllm_convert.common.console import Reporter
from dllm_convert.common.shown_text import BROKEN
from dllm_convert.modeling.published.options import Observer, Progress
from dllm_convert.modeling.text_bounds import end_ids
from dllm_convert.sampling.conversation import Chat
from dllm_convert.sampling.prompts import encode_messages
from dllm_convert.sampling.run import decode_encoded, recorder_of, telling
from dllm_convert.sampling.watch.pieces import TokenText
from dllm_convert.sampling.watch.terminal import Watcher


class Stopped(Exception):
    """An answer was given up before it was done."""


class TextPieces:
    """A streamer that hands on text as soon as nothing can change it, whole characters only.

    Args:
        tokenizer: A transformers tokenizer.
        write: Gets each piece.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] | None = None
        self._sent = ""

    def put(self, value: torch.Tensor) -> None:
        """Take tokens, shape (1, n); the prompt's first."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        text = self._text()
        # A character whose bytes are spread over tokens waits for the last of them.
        if not text.endswith(BROKEN):
            self._hand_on(text)

    def end(self) -> None:
        """Hand on what is left."""
        self._hand_on(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens or [], skip_special_tokens=True))

    def _hand_on(self, text: str) -> None:
        if text.startswith(self._sent) and len(text) > len(self._sent):
            self._write(text[len(self._sent) :])
            self._sent = text


def reply(
    model: Any,
    tokenizer: Any,
    chat: Chat,
    reporter: Reporter,
    *,
    draw: bool = False,
    write: Callable[[str], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    verifier: Any = None,
) -> Chat:
    """Write the answer to what was asked last.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        chat: The conversation; the user spoke last.
        reporter: Where it is drawn, and what is to be known of it told.
        draw: Draw the text below what is on the terminal while it is denoised.
        write: Gets the text in pieces, each when nothing changes it any more.
        stop: Looked at after every forward: whether the answer is given up.
        verifier: As in `decode_samples`.

    Returns:
        The conversation with the answer, whose `facts` say how it was decoded.

    Raises:
        DataError: The template refuses the conversation, or it is longer than the model's context.
        IncompatibleError: The tokenizer has no chat template.
        RequestError: Nothing was asked, or settings contradict.
        Stopped: The answer was given up.
    """
    chat.answer("")  # refuses a conversation in which nothing was asked
    ids = encode_messages(tokenizer, chat.messages, "the conversation")
    recorder = recorder_of(model)
    with ExitStack() as stack:
        observer: Observer | None = None
        if draw:
            text = TokenText(tokenizer, end_ids(model))
            observer = stack.enter_context(Watcher(recorder, text, reporter, screen=False))
        stack.enter_context(telling(reporter))
        (sample,) = decode_encoded(
            model,
            tokenizer,
            [""],
            [ids],
            seed=chat.next_seed,
            observer=_unless(stop, observer),
            streamer=None if write is None else TextPieces(tokenizer, write),
            verifier=verifier,
            **chat.settings,
        )
    facts = {k: v for k, v in sample.as_dict().items() if k not in ("prompt", "text")}
    return chat.answer(sample.text, facts)


def _unless(stop: Callable[[], bool], observer: Observer | None) -> Observer:
    """Return an observer that gives up where it is asked to."""

    def look(progress: Progress) -> None:
        if observer is not None:
            observer(progress)
        if stop():
            raise Stopped

    return look
