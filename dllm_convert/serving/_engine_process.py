"""Answer questions with an engine's own code: run as a process of its own, imported by nothing.

Argument: the module that has `load`. Orders come in and answers go out as lines of JSON; when all
texts are read, a line says whether to go on and write.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What engines raise of a checkpoint that is not what they expect."""


def _answers(load: Any, order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    reader = load(Path(order["out"]))
    for number, given in enumerate(order["texts"]):
        path = Path(order["scratch"]) / f"{number}.npy"
        np.save(path, np.asarray(reader.logits(given), dtype=np.float32))
        yield {"logits": str(path)}
    yield {"read": True}
    if not json.loads(sys.stdin.readline()):
        yield {"done": True}
        return
    for threshold in order["thresholds"]:
        for number, prompt in enumerate(order["prompts"]):
            text = reader.write(prompt, order["new"], order["block"], threshold)
            yield {"threshold": threshold, "prompt": number, "text": [int(one) for one in text]}
    yield {"done": True}


def main(module: str) -> None:
    """Answer order after order until there are no more."""
    # Engines print: their lines must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    load = importlib.import_module(module).load
    while line := sys.stdin.readline():
        try:
            for answer in _answers(load, json.loads(line)):
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
        except BROKEN as error:
            said = " ".join(str(error).split())[:300]
            answers.write(json.dumps({"failed": f"{type(error).__name__}: {said}"}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
