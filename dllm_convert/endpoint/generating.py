"""Decode for a request: in the one thread that has the model, streamed or whole."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    ReasoningText,
    _GenerationCancelled,
    _StreamError,
)

from dllm_convert.sampling.packing import packed_linears

_KEPT = 1000
"""Requests of which it is remembered what they took, the oldest forgotten first."""
_APART = ("seed", "stop_strings")
"""Of a request's generation config what `generate` is given beside it."""


@dataclass(frozen=True)
class Spent:
    """What a decoding took.

    Attributes:
        forwards: Forward passes run.
        tokens: New tokens, the end-of-text token included.
        verifier_forwards: Of two models: how many of the forwards were the verifier's; else None.
    """

    forwards: int
    tokens: int
    verifier_forwards: int | None = None

    def as_usage(self) -> dict[str, float]:
        """Return what a usage says beside the counts of tokens."""
        per_forward = round(self.tokens / max(self.forwards, 1), 3)
        told: dict[str, float] = {"forwards": self.forwards, "tokens_per_forward": per_forward}
        if self.verifier_forwards is not None:
            told["verifier_forwards"] = self.verifier_forwards
        return told


def stop_texts(config: Any) -> tuple[str, ...]:
    """Return the texts that end an answer, of which they are no part."""
    given = getattr(config, "stop_strings", None) or ()
    return (given,) if isinstance(given, str) else tuple(given)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the stops."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class HeldBack:
    """Text on its way out, of which what may be the beginning of a stop is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self._is_cut = stops, "", False

    def feed(self, text: str) -> str:
        """Take text; return what can be told."""
        if self._is_cut:
            return ""
        self._held += text
        told = cut_at(self._held, self._stops)
        if len(told) < len(self._held):
            self._is_cut, self._held = True, ""
            return told
        kept = max((self._begun(stop) for stop in self._stops), default=0)
        told, self._held = told[: len(told) - kept], told[len(told) - kept :]
        return told

    def _begun(self, stop: str) -> int:
        # How much of a stop the text ends with.
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)

    def rest(self) -> str:
        """Return what was held back and is no stop."""
        told, self._held = self._held, ""
        return told


class AnswerStreamer(DirectStreamer):
    """transformers' streamer, for several tokens at once and with stops that are no text."""

    def __init__(self, *arguments: Any, stops: Sequence[str], **more: Any) -> None:
        # The parser's first events are sent while the streamer is made.
        self._text = HeldBack(stops)
        super().__init__(*arguments, **more)

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens, shape (1, n)."""
        super().put(value.flatten())

    def _enqueue(self, item: Any) -> None:
        is_text = isinstance(item, str) and not isinstance(item, ReasoningText)
        if is_text:
            item = self._text.feed(item)
        elif rest := self._text.rest():
            super()._enqueue(rest)
        if not is_text or item:
            super()._enqueue(item)

    def end(self) -> None:
        """Wait: what it took is not known yet, and `close` says that the text has ended."""

    def close(self) -> None:
        """Say that the text has ended."""
        super().end()

    def watch(self, progress: Any) -> None:
        """End the decoding after a forward where the client hung up: nothing else would know."""
        if self._cancelled.is_set():
            raise _GenerationCancelled


class AnswerManager(GenerateManager):
    """Runs one decoding after the other, and remembers what each took.

    Args:
        verifier: Another model that verifies where `verify_with` is "base"; None for none.

    Attributes:
        spent: Of each request, by its id, from its end until it is told.
    """

    def __init__(self, verifier: Any = None) -> None:
        super().__init__()
        self.verifier = verifier
        self.spent: dict[str, Spent] = {}

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Mapping[str, Any],
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], AnswerStreamer]:
        """Begin a decoding; return what its text is read from, and the streamer that writes it."""
        loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = AnswerStreamer(
            processor._tokenizer,
            loop,
            queue,
            response_parser=response_parser,
            stops=stop_texts(gen_config),
        )

        def ended(future: Future[Any]) -> None:
            error = future.exception()
            if error is None:
                return
            # A client that hung up reads nothing; others are told, inside of JSON.
            told = json.dumps(str(error))[1:-1]
            is_gone = isinstance(error, _GenerationCancelled)
            loop.call_soon_threadsafe(queue.put_nowait, None if is_gone else _StreamError(told))

        self.submit(
            self._decode, model, processor, inputs, gen_config, request_id, streamer=streamer
        ).add_done_callback(ended)
        return queue, streamer

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Mapping[str, Any],
        gen_config: Any,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        """Decode to the end; return the text, the prompt's tokens and the new tokens' ids."""
        output = await self.async_submit(
            self._decode, model, processor, inputs, gen_config, request_id
        )
        width = inputs["input_ids"].shape[1]
        ids = output.sequences[0, width : width + self.spent[request_id].tokens].tolist()
        text = processor.decode(ids, skip_special_tokens=True)
        return cut_at(text, stop_texts(gen_config)), width, ids

    def _decode(
        self,
        model: Any,
        tokenizer: Any,
        inputs: Mapping[str, Any],
        gen_config: Any,
        request_id: str,
        streamer: AnswerStreamer | None = None,
    ) -> Any:
        config = copy.deepcopy(gen_config)
        apart = {name: vars(config).pop(name, None) for name in _APART}
        asked = getattr(config, "verify_with", None)
        other = self.verifier if asked == "base" else None
        if other is not None:
            config.verify_with, apart["verify_with"] = None, other
        with packed_linears(model), nullcontext() if other is None else packed_linears(other):
            output = model.generate(
                **inputs,
                generation_config=config,
                tokenizer=tokenizer,
                return_dict_in_generate=True,
                streamer=streamer,
                observer=None if streamer is None else streamer.watch,
                **apart,
            )
        while len(self.spent) >= _KEPT:  # of clients that hung up before they were told
            self.spent.pop(next(iter(self.spent)))
        self.spent[request_id] = Spent(
            output.forwards, int(output.new_tokens[0]), output.verifier_forwards
        )
        if streamer is not None:
            streamer.close()
        return output
