"""What somebody asks for, in Python or on the command line, as one resolved recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from dllm_convert.common.counts import LARGEST_COUNT
from dllm_convert.common.terms import Target
from dllm_convert.errors import RequestError
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.budget import Budget
from dllm_convert.recipe.loading import amend_recipe
from dllm_convert.recipe.loading import load_recipe as load_layers
from dllm_convert.recipe.schema import Recipe
from dllm_convert.recipe.typed import (
    flat,
    method,
    refuse_contradictions,
    refuse_other_source,
    refuse_without_effect,
)


class LaunchRequest(TypedDict, total=False):
    """What can be asked of those who train together.

    Attributes:
        processes: How many train, over all machines; tokens and sequences are shared by them.
        num_machines: How many machines they are on.
        launch_config: Accelerate config, which says what they share; and how many there are, where
            `processes` does not.
        global_batch: Sequences per optimizer step, over all processes.
    """

    processes: int | None
    num_machines: int | None
    launch_config: str | Path | None
    global_batch: int | None


class ConversionRequest(LaunchRequest, total=False):
    """What can be asked of a conversion; each wins over recipe and preset.

    Attributes:
        to: `mdlm` or `bd3lm`.
        block: Tokens per block, for bd3lm only.
        data: Training text: `pydoc`, files or globs, or a Hub dataset id.
        steps: Optimizer steps.
        tokens: Tokens to train on, instead of steps: a number, or text as `"5M"`.
        max_time: Time after which training stops, as `"90m"` or `"1h30m"`.
        preset: Name of a preset whose settings are taken.
        serve: Engine that is to serve the result: `sglang`, `lmdeploy`, `mlx-vlm`, `vllm`,
            `llama.cpp`, `llama-diffusion-cli` or `dllm`; chooses target, token shift and AR loss.
        lora: Train LoRA of this rank.
        full: Train all weights.
        train: False converts without training.
        keep_adapter: Write the LoRA adapter beside the merged weights.
        keep_base: Leave the base as it is: LoRA acts on noisy tokens only and lies beside it.
        revision: Branch, tag or commit of a source on the Hub.
        allow_pickle: Read pickled weights, without running code in them.
        allow_generic: Convert a family that has no adapter, if it passes what is measured.
        allow_epochs: Read the text more often than 20 times.
        report_to: Where training is logged besides: tensorboard, wandb, trackio.
        overrides: Any other fields of a recipe by dotted name, as `--set` takes them.
    """

    to: Target | None
    block: int | None
    data: str | Path | None
    steps: int | None
    tokens: int | str | None
    max_time: str | None
    preset: str | None
    serve: str | None
    lora: int | None
    full: bool
    train: bool
    keep_adapter: bool
    keep_base: bool
    revision: str | None
    allow_pickle: bool
    allow_generic: bool
    allow_epochs: bool
    report_to: Sequence[str] | None
    overrides: Mapping[str, Any] | None


def launch_of(asked: LaunchRequest) -> Launch:
    """Return who is to train together.

    Raises:
        DataError: There is no such config, or it cannot be read.
        IncompatibleError: The config says something that this does not train with.
        RequestError: A number is none, or processes cannot be shared out.
    """
    for name in ("processes", "num_machines", "global_batch"):
        count = asked.get(name)
        if count is not None and not (type(count) is int and 1 <= count <= LARGEST_COUNT):
            raise RequestError(f"{name} is {count!r}, expected a whole number from 1 on")
    config = asked.get("launch_config")
    path = None if config is None else Path(config)
    found = Launch.asked(asked.get("processes"), path, asked.get("num_machines"))
    return replace(found, global_batch=asked.get("global_batch"))


def resolve(source: str | Path | Recipe, **asked: Unpack[ConversionRequest]) -> Recipe:
    """Return the recipe that comes of a source and what is asked.

    Args:
        source: Recipe name or .yaml file, Hub id, folder or .gguf file, tried in that order; or a
            recipe that was resolved already.
        **asked: See `ConversionRequest`.

    Raises:
        RequestError: What is asked contradicts itself, or would change nothing.
        IncompatibleError: There is no such recipe, or a field or value of it is wrong.
        HubError: A source on the Hub cannot be asked whether it is a conversion.
        TypeError: There is no such argument.
    """
    unknown = sorted(set(asked) - ConversionRequest.__optional_keys__)
    if unknown:
        known = ", ".join(sorted(ConversionRequest.__optional_keys__))
        raise TypeError(f"there is no argument {unknown[0]!r}; there are {known}")
    launch = launch_of(asked)
    tokens = asked.get("tokens")
    budget = Budget.parse(
        None if tokens is None else str(tokens), asked.get("max_time"), asked.get("global_batch")
    )
    given = _fields(asked)
    assigned = flat(asked.get("overrides") or {})
    budget.refuse_beside(asked.get("steps"), assigned)
    refuse_contradictions(given, assigned)
    typed = given | budget.fields | assigned
    if isinstance(source, Recipe):
        recipe = _amended(source, typed, asked)
    else:
        from dllm_convert.source.inspect import fetch_small

        preset = asked.get("preset")
        recipe = load_layers(str(source), overrides=typed, preset=preset, fetch=fetch_small)
    recipe = budget.applied_to(recipe, launch.processes, assigned)
    if not isinstance(source, Recipe):
        refuse_other_source(str(source), recipe, assigned)
    refuse_without_effect(recipe, typed)
    return recipe


def _fields(asked: ConversionRequest) -> dict[str, Any]:
    """Return the fields of a recipe that arguments name; what was not given is left out."""
    lora, data, logged = asked.get("lora"), asked.get("data"), asked.get("report_to")
    train, full = asked.get("train", True), asked.get("full", False)
    fields = {
        "target": asked.get("to"),
        "block_size": asked.get("block"),
        "serve": asked.get("serve"),
        "data.source": None if data is None else str(data),
        "training.steps": asked.get("steps"),
        "training.method": method(lora, full=full, no_train=not train),
        "training.lora.rank": lora,
        "training.keep_adapter": asked.get("keep_adapter") or None,
        "training.lora.acts_on": "noisy" if asked.get("keep_base") else None,
        "training.report_to": None if logged is None else list(logged),
        "revision": asked.get("revision"),
        "allow_generic": asked.get("allow_generic") or None,
        "data.allow_epochs": asked.get("allow_epochs") or None,
        "allow_pickle": asked.get("allow_pickle") or None,
    }
    return {field: value for field, value in fields.items() if value is not None}


def _amended(recipe: Recipe, typed: Mapping[str, Any], asked: ConversionRequest) -> Recipe:
    if asked.get("preset") is not None:
        raise RequestError(
            "a recipe that is resolved takes no preset any more",
            hint="Give the preset with the source: plan(source, preset=...)",
        )
    return amend_recipe(recipe, typed) if typed else recipe
