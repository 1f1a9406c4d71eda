"""A launch for people, from the section `launch` of the document that `check --json` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def together(plan: Mapping[str, Any]) -> str | None:
    """Name the processes of a plan's launch, and what they share; None of one process."""
    launch = plan.get("launch", {"processes": 1})
    return None if launch["processes"] == 1 else _processes(launch)


def launch_line(launch: Mapping[str, Any]) -> str:
    """Say who trains together, and on how much at a time."""
    return f"{_processes(launch)}, {launch['sequences_per_step']:,} sequences per step"


def _processes(launch: Mapping[str, Any]) -> str:
    several = "" if launch["processes"] == 1 else "es"
    machines = f" on {launch['machines']} machines" if launch["machines"] > 1 else ""
    return f"{launch['processes']} process{several}{machines} ({launch['name']})"


def launch_sentences(plan: Mapping[str, Any]) -> Iterator[str]:
    """Say what becomes of the recipe's steps and of its learning rate.

    Args:
        plan: The document, which has a launch.
    """
    launch, tokens = plan["launch"], plan["training_tokens"]
    if launch["budget"] == "tokens":
        yield (
            f"the budget is in tokens: {tokens:,} of them at least, however many processes there "
            f"are; that makes {launch['steps']:,} steps"
        )
    elif launch["processes"] > 1:
        yield (
            f"the recipe says {launch['steps']:,} steps, whatever one reads: together they read "
            f"{tokens:,} tokens (--tokens N keeps a budget)"
        )
    times = launch["sequences_per_step"] // launch["sequences_of_one"]
    if times > 1:
        one = launch["sequences_of_one"]
        keeps = f"; --global-batch {one} keeps batch, steps and rate"
        yield (
            f"the learning rate stays {launch['learning_rate']:g}; a step has {times} times the "
            "sequences of one process, for which the square root of that (Malladi et al., arXiv "
            f"2205.10287, for Adam) says {launch['learning_rate_by_square_root']:g}"
            + ("" if one % launch["processes"] else keeps)
        )
