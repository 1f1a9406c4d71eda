"""The base as lm-eval's own `hf` model runs it, with what it took counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from dllm_convert.evaluation.effort import Effort


class AutoregressiveLM(HFLM):  # type: ignore[misc]
    """An autoregressive model: its own likelihood and greedy decoding.

    Args:
        **given: Arguments of lm-eval's `hf` model.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.effort = Effort()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations; one forward each, nothing is drawn."""
        started = time.monotonic()
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        self.effort.scoring_seconds += time.monotonic() - started
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write text, one token per forward and row."""
        started = time.monotonic()
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        self.effort.writing_seconds += time.monotonic() - started
        written = sum(len(self.tok_encode(text, add_special_tokens=False)) for text in texts)
        self.effort.new_tokens += written
        self.effort.row_forwards += written
        return texts
