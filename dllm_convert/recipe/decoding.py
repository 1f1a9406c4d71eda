"""The settings of decoding, described once: for recipes, and for the options of `sample`.

Imports no pydantic, so that the command line can read it for its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Order = Literal["confidence", "margin", "entropy", "random"]
Remasking = Literal["low_confidence", "random"]

Verifier = Literal["self", "base"]
Sampler = Literal["ancestral"]
Kind = Literal["count", "number", "choice", "switch"]
MORE = "Decoding"
"""Panel of the help that holds what is rarely needed."""


@dataclass(frozen=True)
class Setting:
    """One setting of decoding.

    Attributes:
        says: What it does, without a full stop.
        kind: A whole number from 1 on, a number from 0 on, one of `choices`, or on and off.
        metavar: What stands for its value in a help text.
        empty: What holds where a recipe leaves it empty; no text if that is said already.
        most: Largest number.
        choices: The values of a choice.
        flag: Its option on the command line, where that is not its name.
        panel: Panel of the help, None for the first.
    """

    says: str
    kind: Kind
    metavar: str = ""
    empty: str = ""
    most: float | None = None
    choices: tuple[str, ...] = ()
    flag: str | None = None
    panel: str | None = MORE

    @property
    def described(self) -> str:
        """What it does, for a table of a recipe's fields."""
        return f"{self.says}; empty: {self.empty}" if self.empty else self.says


SETTINGS: Mapping[str, Setting] = {
    "max_new_tokens": Setting("tokens to write", "count", "N", panel=None),
    "max_denoising_steps": Setting(
        "forwards per block (bd3lm) or per text (mdlm)",
        "count",
        "N",
        empty="one token each",
        flag="--steps",
        panel=None,
    ),
    "confidence_threshold": Setting(
        "commit every token at least this sure",
        "number",
        "P",
        empty="fixed steps",
        most=1,
        flag="--threshold",
        panel=None,
    ),
    "temperature": Setting("0 takes the likeliest token", "number", "T", panel=None),
    "verify_with": Setting(
        "write what autoregressive decoding would, and denoise only to draft it: by the same "
        "weights, or by the base a gated adapter leaves as it was",
        "choice",
        empty="what is denoised is written",
        choices=get_args(Verifier),
    ),
    "sampler": Setting(
        "draw from the reverse of the noise it was trained with, step by step, and rank nothing; "
        "exact at temperature 1",
        "choice",
        empty="what is surest is written first",
        choices=get_args(Sampler),
    ),
    "entropy_bound": Setting(
        "commit the surest tokens whose entropies in nats, the largest left out, sum to at most "
        "this",
        "number",
        "NATS",
    ),
    "unmasking": Setting(
        "what positions are ranked by", "choice", empty="confidence", choices=get_args(Order)
    ),
    "remasking": Setting(
        "take tokens of earlier steps back", "choice", empty="none", choices=get_args(Remasking)
    ),
    "remasking_ratio": Setting("share of them per step, below 1; 0.1 by default", "number", "R"),
    "top_k": Setting("draw from the K likeliest tokens", "count", "K"),
    "top_p": Setting(
        "draw from the fewest tokens that hold this probability", "number", "P", most=1
    ),
    "min_p": Setting(
        "draw from tokens at least this likely, relative to the likeliest", "number", "P", most=1
    ),
    "guidance_scale": Setting(
        "classifier-free guidance with the prompt masked; 1 is none", "number", "W"
    ),
    "block_length": Setting(
        "write so many tokens at a time from left to right; mdlm only", "count", "N"
    ),
    "sub_block_size": Setting(
        "write a block so many tokens at a time from left to right; bd3lm only", "count", "N"
    ),
    "approximate_cache": Setting(
        "keep the states outside the block, not exact; mdlm with block_length only", "switch"
    ),
}
"""Every setting by the name that decoding, and section `generation` of a recipe, have for it."""
