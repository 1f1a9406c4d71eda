"""What was typed is obeyed, or refused: options that contradict each other, or change nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.errors import RequestError

if TYPE_CHECKING:
    from dllm_convert.recipe.schema import Recipe, Training

_SOURCE = "source"
_OF_A_MODEL = tuple(f"training.{n}" for n in ("method", "seed", "precision", "attention"))
"""What of a training counts where nothing is trained: how the model runs when it is measured."""
_OF_A_MERGED_ADAPTER = (
    *(f"training.lora.{n}" for n in ("embeddings", "norms")),
    "training.keep_adapter",
)
"""What is said of an adapter that ends in the weights."""
_OF_DATASETS = ("data.subset", "data.split", "data.revision", "data.held_out_split")


def refuse_contradictions(given: Mapping[str, Any], assigned: Mapping[str, Any]) -> None:
    """Refuse a field that an option and `--set` say differently.

    Args:
        given: Fields of the options.
        assigned: Fields of `--set`.

    Raises:
        RequestError: There is such a field.
    """
    for field in given.keys() & assigned.keys():
        if given[field] != assigned[field]:
            raise RequestError(
                f"`overrides` {field}={_said(assigned[field])} contradicts another option, which "
                f"says {_said(given[field])}"
            )


def refuse_other_source(source: str, recipe: Recipe, assigned: Mapping[str, Any]) -> None:
    """Refuse a second source beside a checkpoint; a recipe's own may be replaced.

    Raises:
        RequestError: There is one.
    """
    other = assigned.get(_SOURCE, source)
    if recipe.name is None and other != source:
        raise RequestError(
            f"`overrides` source={_said(other)} contradicts `source`, which is {source}"
        )


_ASKED_BY = {
    "training.lora.acts_on": "`keep_base` (training.lora.acts_on)",
    "training.keep_adapter": "`keep_adapter`",
}
"""Fields with an argument of their own, whose name nobody knows them by."""


def refuse_without_effect(recipe: Recipe, typed: Mapping[str, Any]) -> None:
    """Refuse what was typed and would change nothing.

    Args:
        recipe: What came of it.
        typed: Fields set by flags and `--set`.

    Raises:
        RequestError: There is such a field.
    """
    for field, value in _flat(typed):
        if value is None or value is False:
            continue
        why = _idle(field, recipe)
        if why is not None:
            raise RequestError(f"{_ASKED_BY.get(field, field)} would change nothing: {why}")


def _idle(field: str, recipe: Recipe) -> str | None:
    """Return why a field has no effect beside the others, None if it has one."""
    if field.startswith("training."):
        return _idle_training(field, recipe.training)
    noise, data = recipe.noise, recipe.data
    if field == "noise.power" and noise.schedule != "polynomial":
        return f"the noise schedule is {noise.schedule}; add `overrides` noise.schedule=polynomial"
    if field == "data.held_out_fraction" and data.held_out_source is not None:
        return "data.held_out_source is measured on, and nothing is held out of data.source"
    if data.source == "pydoc" and field in _OF_DATASETS and data.held_out_source is None:
        if field == "data.split" and "[" in data.split:
            return None
        return "data.source is pydoc, which is no dataset with subsets and splits"
    return None


def _idle_training(field: str, training: Training) -> str | None:
    of_lora = field.startswith("training.lora.") or field == "training.keep_adapter"
    if of_lora and training.method != "lora":
        return f"the training method is {training.method}; add `lora={training.lora.rank}`"
    if training.keeps_base and field in _OF_A_MERGED_ADAPTER:
        return "the base stays as it is (`keep_base`), and the adapter lies beside it anyway"
    if training.method == "none" and field not in _OF_A_MODEL:
        return "nothing is trained (`train=False`, or training.method none)"
    if field == "training.mask_noise_std" and not training.mask_noise_steps:
        return "the noise fades over 0 steps; add `overrides` training.mask_noise_steps=N"
    if field == "training.mask_noise_steps" and not training.mask_noise_std:
        return "the noise is 0; add `overrides` training.mask_noise_std=X"
    return None


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names: `--set` takes a whole section, too."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections as dotted names; an empty section stands for itself."""
    return dict(_flat(fields))


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def method(lora: int | None, *, full: bool, no_train: bool) -> str | None:
    """Return the training method the flags name, None if they name none.

    Raises:
        RequestError: They name several.
    """
    chosen = [
        name
        for name, given in (("lora", lora is not None), ("full", full), ("none", no_train))
        if given
    ]
    if len(chosen) > 1:
        raise RequestError("give one of `lora`, `full` and `train=False`")
    return chosen[0] if chosen else None


def default_out(recipe: Recipe) -> Path:
    """Return the output folder where none was given.

    Going on from a conversion counts its names instead of piling them up: x-bd3lm, x-bd3lm-2.
    """
    name = recipe.name or Path(recipe.source).resolve().name.removesuffix(".gguf")
    going_on = re.fullmatch(r"(.+)-(mdlm|bd3lm)(?:-(\d{1,6}))?", name)
    if recipe.name is None and going_on:
        base, target, number = going_on.groups()
        again = f"-{int(number or 1) + 1}" if target == recipe.target else ""
        return Path(f"{base}-{recipe.target}{again}")
    return Path(f"{name}-{recipe.target}")
