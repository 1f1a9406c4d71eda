"""How a model is evaluated: settings, and published ones by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from dllm_convert.errors import DataError

Greedy = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Settings:
    """How likelihoods are estimated and text is written.

    Attributes:
        masking: Estimator of the bound: `count` (k tokens without replacement) or `time`.
        draws: Draws of noise per round.
        rounds: Most rounds per question.
        confidence: Stop drawing for a question once the ranking of its choices is decided with
            this probability; 1 never stops early.
        greedy: When to find out by decoding whether a continuation is what the model would write:
            `auto` where a context has a single continuation, `always` or `never`.
        seed: Seed of the noise and of sampling.
        max_new_tokens: Tokens to write where a task names no number.
        block_size: Tokens per block, instead of the checkpoint's; bd3lm only.
        generation: Settings of decoding, instead of the checkpoint's generation_config.json.
    """

    masking: Literal["count", "time"] = "count"
    draws: int = 8
    rounds: int = 8
    confidence: float = 0.99
    greedy: Greedy = "auto"
    seed: int = 0
    max_new_tokens: int = 256
    block_size: int | None = None
    generation: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Published:
    """Settings a paper or project reports its numbers with.

    Attributes:
        settings: As far as this package can follow them.
        shots: Examples before each question by lm-eval's name of the task.
        source: Where they stand.
        differs: What is different here, empty if nothing is known to be.
    """

    settings: Settings
    shots: Mapping[str, int]
    source: str
    differs: str = ""


def merge(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return settings with some of them, or of decoding's, replaced.

    Args:
        settings: Where to start from.
        given: Fields of `Settings`, and anything else for decoding.
    """
    own = {item.name for item in fields(Settings)} - {"generation"}
    mine = {name: value for name, value in given.items() if name in own and value is not None}
    theirs = {name: value for name, value in given.items() if name not in own and value is not None}
    return replace(settings, **mine, generation={**settings.generation, **theirs})


PUBLISHED: Mapping[str, Published] = MappingProxyType({})
"""Published settings by name."""


def find_settings(name: str | None) -> Settings:
    """Return published settings, or this package's own where no name is given.

    Raises:
        DataError: There are none of that name.
    """
    if name is None:
        return Settings()
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f"The nearest is {near[0]}" if near else f"Known: {', '.join(PUBLISHED)}"
        raise DataError(f"no published settings are called {name!r}", hint=hint)
    return PUBLISHED[name].settings
