"""An engine that misbehaves as told: what a proof has to live with.

Its process has nothing but a folder: answers that a test computed before, and what to do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dllm_convert.serving.engines import EngineCode, Questions

CODE = EngineCode("Pretend", "pretend_engine", "pretend-engine", "1.0", None, "pretend_engine")
PLACE = "PRETEND"
"""Variable with the folder."""
TEXTS_BEFORE = 4
"""Texts that a slow engine writes before it stops."""


def prepare(place: Path, subject: Any, asked: Questions) -> None:
    """Write down what an honest engine answers."""
    texts = {}
    for prompt, text in zip(asked.prompts, asked.texts, strict=True):
        np.save(place / f"{len(text)}.npy", subject.logits(text))
        for threshold in asked.thresholds:
            texts[f"{threshold} {len(prompt)}"] = subject.write(prompt, asked, threshold)
    (place / "texts.json").write_text(json.dumps(texts))


class Pretend:
    def __init__(self, place: Path) -> None:
        self.place, self.texts = place, 0
        self.does = (place / "does").read_text()
        self.known = json.loads((place / "texts.json").read_text())

    def logits(self, prompt: Sequence[int]) -> Any:
        if self.does == "silent":
            time.sleep(600)
        if self.does == "dies":
            sys.stderr.write("Segmentation fault, says nobody\n")
            sys.stderr.flush()
            os._exit(139)
        if self.does == "chatty":
            sys.stdout.write("loading 100%\n")
            sys.stdout.flush()
            os.system("echo a line of C")
        found = np.load(self.place / f"{len(prompt)}.npy")
        return found + 1e-2 if self.does == "other logits" else found

    def write(self, prompt: Sequence[int], new: int, block: int, threshold: float) -> list[int]:
        if self.does == "slow" and self.texts == TEXTS_BEFORE:
            time.sleep(600)
        if self.does == "raises":
            raise KeyError("lm_head.weight")
        self.texts += 1
        text = self.known[f"{threshold} {len(prompt)}"]
        return [*text[:-1], text[-1] + 1] if self.does == "other token" else text


def load(out: Path) -> Pretend:
    return Pretend(Path(os.environ[PLACE]))
