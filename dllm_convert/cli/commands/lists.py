"""`recipes` and `architectures`: what is there."""

from __future__ import annotations

from dataclasses import asdict

from dllm_convert.cli import options as option
from dllm_convert.cli import output
from dllm_convert.common.tables import Table


def recipes(name: option.RecipeName = None, as_json: option.Json = False) -> None:
    """List the recipes, or show one with every field it resolves to."""
    from dllm_convert.recipe.loading import dump_recipe, list_recipes, load_recipe

    if name is not None:
        recipe = load_recipe(name, overrides={})
        if as_json:
            output.write_json(recipe.model_dump(mode="json"))
        else:
            output.write(dump_recipe(recipe))
        return
    entries = list_recipes()
    from dllm_convert.pipeline.listed import listed, listed_table

    if as_json:
        output.write_json([listed(entry) for entry in entries])
        return
    output.write(str(listed_table(entries)))


def architectures(as_json: option.Json = False) -> None:
    """List the model families that can be converted."""
    from dllm_convert.adapters import all_adapters

    families = all_adapters()
    if as_json:
        output.write_json([asdict(family) for family in families])
        return
    header = ("model_type", "class", "targets", "attention of the base", "transformers")
    rows = [
        (
            family.model_type,
            family.stock_class,
            " ".join(family.targets),
            family.attention,
            f">={family.min_transformers}",
        )
        for family in families
    ]
    output.write(str(Table(header, rows)))
