"""What the fields of a recipe's text have to do with each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dllm_convert.recipe.contradiction import Contradiction, Rule, clashes, idle
from dllm_convert.recipe.splits import SPLIT, mixture_line, sliced

if TYPE_CHECKING:
    from dllm_convert.recipe.schema import Recipe


def _written(recipe: Recipe) -> Iterator[Contradiction]:
    """What text that the base writes needs."""
    data, field = recipe.data, "data.write_with_base"
    asked = data.write_with_base
    if not asked.prompts:
        yield from idle(asked, field, "prompts", 1000)
        return
    rules: tuple[Rule, ...] = (
        ("training.method", recipe.training.method == "none", "nothing is trained",
         f"Leave {field} out"),
        ("data.mixture", bool(data.mixture), "prompts are taken from one text",
         "Name one of them with --data"),
        (f"{field}.top_p", asked.temperature == 0 and asked.top_p < 1,
         "at temperature 0 nothing is drawn", f"--set {field}.temperature=1"),
    )  # fmt: skip
    yield from clashes(f"{field}.prompts", rules)


def of_texts(recipe: Recipe) -> Iterator[Contradiction]:
    """Yield what texts, their parts and their mixture need and do not have."""
    data, field = recipe.data, "data.mixture"
    splits = {"data.split": data.split, "data.held_out_split": data.held_out_split}
    named = [(name, split) for name, split in splits.items() if split is not None]
    for name, split in (*named, *((field, text.split) for text in data.mixture)):
        try:
            sliced(split)
        except ValueError as error:
            yield Contradiction(str(error), f"Write {name} so, or without brackets", (name,))
    yield from _written(recipe)
    if not data.mixture:
        return
    line = mixture_line([text.model_dump() for text in data.mixture])
    if data.source != line:
        yield Contradiction(
            f"data.source is {data.source}, and data.mixture mixes {line}",
            "Give one of them",
            ("data.source", field),
        )
    kept = [tuple(text.model_dump(exclude={"weight"}).items()) for text in data.mixture]
    for text, own in zip(data.mixture, kept, strict=True):
        if kept.count(own) > 1:
            yield Contradiction(
                f"{field} names {text.source} twice", "Add up its weights, or name parts", (field,)
            )
    rules: tuple[Rule, ...] = (
        ("data.subset", data.subset is not None, "each text has its own", "NAME:SUBSET/SPLIT:0.5"),
        ("data.split", data.split != SPLIT, "each text has its own", "NAME:SPLIT:0.5"),
        ("data.revision", data.revision is not None, "each text has its own",
         f"`revision` beside each `source` of {field}, in a recipe"),
        ("data.held_out_split",
         data.held_out_split is not None and data.held_out_source is None,
         "it could be that of any of the texts", "--set data.held_out_source=NAME beside it"),
    )  # fmt: skip
    for name, found, why, hint in rules:
        if found:
            yield Contradiction(
                f"{name} and a mixture of texts do not go together: {why}", hint, (name, field)
            )
