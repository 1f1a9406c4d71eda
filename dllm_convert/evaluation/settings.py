"""How a model is evaluated: settings, and published ones by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from dllm_convert.common.counts import LARGEST_COUNT
from dllm_convert.errors import RequestError
from dllm_convert.modeling.published.options import DecodingOptions

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
        length: Tokens to write whatever a task says: text is denoised in a canvas of this length,
            which moves the scores of MDLM.
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
    length: int | None = None
    block_size: int | None = None
    generation: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Published:
    """Settings a paper or project reports its numbers with.

    Attributes:
        settings: As far as this package can follow them.
        shots: Examples before each question by lm-eval's name of the task.
        source: Where they stand.
        chat: Whether questions are asked through the chat template.
        differs: What is different here, empty if nothing is known to be.
    """

    settings: Settings
    shots: Mapping[str, int]
    source: str
    chat: bool = False
    differs: str = ""


def merge(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return settings with some of them, or of decoding's, replaced.

    Args:
        settings: Where to start from.
        given: Fields of `Settings`, None leaving one as it is, and anything else for decoding,
            where None means none, as in no confidence threshold.

    Raises:
        RequestError: A setting is unknown to both, or no value that one of `Settings` can have.
    """
    own = {item.name for item in fields(Settings)} - {"generation"}
    known = own | {item.name for item in fields(DecodingOptions)} | {"do_sample", "eos_token_id"}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"The nearest is {near[0]}" if near else f"Known: {', '.join(sorted(known))}"
            raise RequestError(f"no setting of an evaluation is called {name!r}", hint=hint)
    mine = {name: value for name, value in given.items() if name in own and value is not None}
    for name, value in mine.items():
        _check(name, value)
    theirs = {name: value for name, value in given.items() if name not in own}
    return replace(settings, **mine, generation={**settings.generation, **theirs})


def _check(name: str, value: Any) -> None:
    """Refuse what an evaluation's own setting cannot be; those of decoding are looked at apart."""
    whole, words = type(value) is int, {"masking": ("count", "time"), "greedy": get_args(Greedy)}
    if name in words:
        right, expected = value in words[name], f"one of {', '.join(words[name])}"
    elif name == "confidence":
        right, expected = type(value) in (int, float) and 0 < value <= 1, "above 0, at most 1"
    else:
        least = 0 if name == "seed" else 1
        right = whole and least <= value <= LARGEST_COUNT
        expected = f"a whole number from {least} to {LARGEST_COUNT:,}"
    if not right:
        raise RequestError(f"{name} is {value!r}, expected {expected}", argument="settings")


_ONE_TOKEN = {"confidence_threshold": None, "max_denoising_steps": None, "temperature": 0.0}
"""One token per forward: as many steps as tokens, in the words of the projects below."""

_TINY_A2D_SHOTS = {
    "bbh": 3,
    "gsm8k_cot": 0,
    "humaneval_instruct": 0,
    "mbpp_instruct": 0,
    "minerva_math": 0,
    "mmlu_pro": 0,
}

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "tiny-a2d-mdlm": Published(
            Settings(length=256, generation=_ONE_TOKEN),
            _TINY_A2D_SHOTS,
            "github.com/ZHZisZZ/dllm at ca17675, examples/a2d/mdlm/eval.sh and README.md",
            chat=True,
            differs="MMLU and HellaSwag are tasks of its fork of lm-eval, three tokens written; "
            "its eval.sh gives gsm8k_cot five examples, its README none",
        ),
        "tiny-a2d-bd3lm": Published(
            Settings(length=256, block_size=32, generation=_ONE_TOKEN),
            _TINY_A2D_SHOTS,
            "github.com/ZHZisZZ/dllm at ca17675, examples/a2d/bd3lm/eval.sh",
            chat=True,
            differs="MMLU and HellaSwag are tasks of its fork of lm-eval, three tokens written; "
            "blocks are counted here from the beginning of the prompt",
        ),
        "llada-base": Published(
            Settings(
                rounds=16,
                confidence=1.0,
                greedy="never",
                length=1024,
                generation=_ONE_TOKEN,
            ),
            {
                "arc_challenge": 0,
                "gpqa_main_n_shot": 5,
                "hellaswag": 0,
                "piqa": 0,
                "truthfulqa_mc2": 0,
                "winogrande": 5,
            },
            "github.com/ML-GSAI/LLaDA at b7e6c35, eval_llada_lm_eval.sh and EVAL.md",
            differs="128 draws as there, but one noise for all choices; MMLU has a single draw "
            "there (--set draws=1 --set rounds=1, five examples); likelihoods with classifier-free "
            "guidance are not offered",
        ),
        "fast-dllm-v2": Published(
            Settings(
                draws=1,
                rounds=1,
                greedy="never",
                length=2048,
                block_size=32,
                generation=_ONE_TOKEN,
            ),
            {"gsm8k": 0, "minerva_math": 0, "mmlu": 5},
            "github.com/NVlabs/Fast-dLLM at 65b6c8f, v2/eval_script.sh, v2/eval.py and "
            "v2/generation_functions.py",
            chat=True,
            differs="a block is written from left to right there, 8 tokens at a time, and its "
            "first token by the causal pass over the block before; of a choice only the first "
            "token is scored, with masks behind it; GSM8K and MATH are asked to put the answer "
            "into \\boxed{}",
        ),
    }
)
"""Published settings by name."""


def find_settings(name: str | None) -> Settings:
    """Return published settings, or this package's own where no name is given.

    Raises:
        RequestError: There are none of that name.
    """
    return Settings() if name is None else find_published(name).settings


def find_published(name: str) -> Published:
    """Return published settings with what else is known of them.

    Raises:
        RequestError: There are none of that name.
    """
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f"The nearest is {near[0]}" if near else f"Known: {', '.join(PUBLISHED)}"
        raise RequestError(f"no published settings are called {name!r}", hint=hint)
    return PUBLISHED[name]
