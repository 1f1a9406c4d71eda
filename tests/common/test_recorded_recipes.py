"""What a recipe may say, the manifest of its run may say: the two forms agree."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from dllm_convert.common import manifest_form
from dllm_convert.recipe.schema import Recipe


def values(kind: Any) -> Iterator[Any]:
    """A value of each kind that an annotation allows."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from values(get_args(kind)[0])
    elif origin in (Union, UnionType):
        for part in get_args(kind):
            yield from values(part)
    elif origin is Literal:
        yield from get_args(kind)
    elif origin is tuple:
        yield []
    else:
        yield {int: 3, float: 0.5, str: "text", bool: True, NoneType: None}[kind]


def shared(form: type[BaseModel], schema: type[BaseModel], at: str = "") -> Iterator[Any]:
    """Fields that both have, down to those that hold no others."""
    for name, field in form.model_fields.items():
        own = schema.model_fields[name]
        inner = [kind for kind in (own.annotation, *get_args(own.annotation))
                 if isinstance(kind, type) and issubclass(kind, BaseModel)]  # fmt: skip
        if inner:
            parts = (field.annotation, *get_args(field.annotation))
            forms = [part for part in parts if isinstance(part, type) and part is not NoneType]
            yield from shared(forms[0], inner[0], f"{at}{name}.")
        else:
            yield pytest.param(field.annotation, own.annotation, id=f"{at}{name}")


@pytest.mark.parametrize(("form", "schema"), list(shared(manifest_form._Recipe, Recipe)))
def test_whatever_the_recipe_takes_the_manifest_takes(form: Any, schema: Any) -> None:
    read = TypeAdapter(form, config={"strict": True})
    for value in values(schema):
        try:
            read.validate_python(value)
        except ValidationError as error:
            pytest.fail(f"{value!r}: {error}")
