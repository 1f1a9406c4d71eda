"""The base as lm-eval's own `hf` model runs it, with what it took counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from dllm_convert.common.console import Reporter, Task
from dllm_convert.evaluation.effort import Effort
from dllm_convert.evaluation.subject import scored_from
from dllm_convert.modeling.loading import load_complete
from dllm_convert.modeling.text_bounds import leave_open


class _Counted(CacheHook):  # type: ignore[misc]
    """What lm-eval tells of every answer, so that its cache can keep it; counts them besides."""

    def __init__(self, inner: CacheHook, task: Task) -> None:
        super().__init__(None)
        self._inner, self._task = inner, task

    def add_partial(self, *given: Any) -> None:
        """Count an answer and pass it on."""
        self._task.advance()
        self._inner.add_partial(*given)


@dataclass(frozen=True)
class _Complete:
    """A class of models that loads them completely or not at all.

    Attributes:
        inner: The auto class that lm-eval chose.
    """

    inner: Any

    def from_pretrained(self, source: str, **settings: Any) -> Any:
        """Load a model.

        Raises:
            DataError: It cannot be loaded, or not completely.
        """
        return load_complete(self.inner, source, **settings)


class AutoregressiveLM(HFLM):  # type: ignore[misc]
    """An autoregressive model: its own likelihood and greedy decoding.

    Args:
        reporter: Progress, instead of lm-eval's own bars.
        **given: Arguments of lm-eval's `hf` model.
    """

    cache_hook: Any
    AUTO_MODEL_CLASS: Any

    def __init__(self, *, reporter: Reporter, **given: Any) -> None:
        super().__init__(**given)
        leave_open(self.tokenizer)
        self.effort = Effort()
        self.reporter = reporter

    def _create_model(self, *given: Any, **settings: Any) -> None:
        """Load as lm-eval does, and read what the loader reports."""
        chosen = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _Complete(chosen)
        try:
            super()._create_model(*given, **settings)
        finally:
            self.AUTO_MODEL_CLASS = chosen

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations; one forward each, nothing is drawn."""
        started = time.monotonic()
        with self._counting("score", len(requests)):
            found: list[tuple[float, bool]] = super().loglikelihood(requests, True)
        self.effort.scoring_seconds += time.monotonic() - started
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write text, one token per forward and row."""
        started = time.monotonic()
        with self._counting("write", len(requests)):
            texts: list[str] = super().generate_until(requests, True)
        self.effort.writing_seconds += time.monotonic() - started
        written = sum(len(self.tok_encode(text, add_special_tokens=False)) for text in texts)
        self.effort.new_tokens += written
        self.effort.row_forwards += written
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tell continuation from context as for a conversion; lm-eval allows no empty one."""
        found: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        if found[1]:
            return found
        given, whole = found[0], list(self.tok_encode(context + continuation))
        start = scored_from(given, whole, continuation)
        return whole[:start] or [self.prefix_token_id], whole[start:]

    @contextmanager
    def _counting(self, what: str, answers: int) -> Iterator[None]:
        inner = self.cache_hook
        with self.reporter.task(what, total=answers) as task:
            self.cache_hook = _Counted(inner, task)
            try:
                yield
            finally:
                self.cache_hook = inner
