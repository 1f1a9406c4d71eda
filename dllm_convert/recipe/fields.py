"""The recipe's fields as words: for error messages, and for the table in docs/recipes.md."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from dllm_convert.common.counts import LARGEST_COUNT, LARGEST_SEED, LARGEST_TOKENS, LONGEST_MINUTES
from dllm_convert.recipe.schema import Recipe

_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}

_BEYOND_REASON = (LARGEST_COUNT, LARGEST_SEED, LARGEST_TOKENS, LONGEST_MINUTES)
"""Bounds that are said to those who meet them only."""


@dataclass(frozen=True)
class Field:
    """One leaf of the recipe.

    Attributes:
        path: Dotted path, such as `training.learning_rate`.
        allowed: The values it takes, in words.
        default: The value when nothing sets it; None also when it must be given.
        required: Whether it must be given.
        description: What it does.
    """

    path: str
    allowed: str
    default: Any
    required: bool
    description: str

    @property
    def section(self) -> str:
        """Path of the mapping that holds the field, empty at the top."""
        return self.path.rpartition(".")[0]


@cache
def all_fields() -> Mapping[str, Field]:
    """Return every field of the recipe by its dotted path, in the order of `schema.py`."""
    schema = Recipe.model_json_schema()
    return {field.path: field for field in _walk(schema, schema.get("$defs", {}), "")}


@cache
def sections() -> frozenset[str]:
    """Return the dotted paths of the mappings that hold fields."""
    return frozenset(field.section for field in all_fields().values() if field.section)


def fields_of(section: str) -> list[str]:
    """Return the names that stand directly in a section (empty: at the top)."""
    prefix = f"{section}." if section else ""
    inside = [path.removeprefix(prefix) for path in all_fields() if path.startswith(prefix)]
    return list(dict.fromkeys(name.partition(".")[0] for name in inside))


def nearest_field(path: str) -> Field | None:
    """Return the field a mistyped path most probably meant."""
    fields = all_fields()
    # A right name in the wrong section, such as a top-level `learning_rate`, before typing errors.
    leaf = path.rpartition(".")[2]
    same_leaf = [known for known in fields if known.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(path, same_leaf or fields, n=1, cutoff=0.4)
    return fields[close[0]] if close else None


def field_path(error: ErrorDetails) -> str:
    """Return the dotted path of the field that pydantic means; not which of its kinds it tried."""
    parts = [str(part) for part in error["loc"] if isinstance(part, str)]
    while len(parts) > 1 and ".".join(parts[:-1]) in all_fields():
        parts.pop()
    return ".".join(parts)


def describe_problem(error: ErrorDetails) -> str:
    """Say in words what pydantic found wrong: field, value found, values expected."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])  # UnsoundError: it is in words already.
    path = field_path(error)
    item = _item(error)
    if item is not None:
        return item
    if error["type"] == "extra_forbidden":
        near = nearest_field(path)
        suggestion = f", the nearest is {near.path} ({near.allowed})" if near else ""
        return f"unknown field {path}{suggestion}"
    expected = _expected(path)
    if error["type"] == "missing":
        return f"the field {path} is missing, expected {expected}"
    found = json.dumps(error["input"], ensure_ascii=False, default=str)
    most = error.get("ctx", {}).get("le")
    if most in _BEYOND_REASON:
        expected += f", at most {most:,}"
    return f"{path} is {found}, expected {expected}"


def _item(error: ErrorDetails) -> str | None:
    """Say what is wrong inside an item of a list of sections; None if it is no such place."""
    loc = error["loc"]
    place = next((at for at, part in enumerate(loc) if isinstance(part, int)), None)
    if place is None or not (known := _items(".".join(map(str, loc[:place])))):
        return None
    where = f"{'.'.join(map(str, loc[:place]))}[{loc[place]}]"
    name = next((part for part in loc[place + 1 :] if isinstance(part, str)), None)
    if name is None or error["type"] == "extra_forbidden":
        found = where if name is None else f"{where}: unknown field {name}"
        return f"{found}, expected the fields {', '.join(known)}"
    expected = f"expected {known[name].allowed}"
    if error["type"] == "missing":
        return f"the field {name} of {where} is missing, {expected}"
    found = json.dumps(error["input"], ensure_ascii=False, default=str)
    return f"{where}.{name} is {found}, {expected}"


@cache
def _items(path: str) -> Mapping[str, Field]:
    """Return the fields of the sections that a field lists, by name; none of other fields."""
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    entry: Any = schema
    for name in path.split("."):
        entry = entry.get("properties", {}).get(name, {})
        entry = definitions.get(entry.get("$ref", "").rpartition("/")[2], entry)
    section = definitions.get(entry.get("items", {}).get("$ref", "").rpartition("/")[2])
    return {} if section is None else {f.path: f for f in _walk(section, definitions, "")}


def _expected(path: str) -> str:
    field = all_fields().get(path)
    return field.allowed if field else f"a section with the fields {', '.join(fields_of(path))}"


def _walk(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str
) -> Iterator[Field]:
    required = schema.get("required", ())
    for name, entry in schema["properties"].items():
        path = prefix + name
        if "$ref" in entry:
            section = definitions[entry["$ref"].rpartition("/")[2]]
            yield from _walk(section, definitions, f"{path}.")
        else:
            description = entry.get("description", "")
            yield Field(path, _allowed(entry), entry.get("default"), name in required, description)


def _allowed(entry: Mapping[str, Any]) -> str:
    if "anyOf" in entry:
        kinds = [kind for kind in entry["anyOf"] if kind.get("type") != "null"]
        allowed = " or ".join(_allowed(kind) for kind in kinds)
        return allowed if len(kinds) == len(entry["anyOf"]) else f"{allowed}, or empty"
    if "const" in entry:
        return str(entry["const"])
    if "enum" in entry:
        *first, last = entry["enum"]
        return f"{', '.join(first)} or {last}" if first else str(last)
    if entry["type"] == "array":
        kind = "section" if "$ref" in entry["items"] else entry["items"]["type"]
        return f"list of {'texts' if kind == 'string' else f'{kind}s'}"
    if "pattern" in entry:
        return "text that is not empty"
    bounds = [
        f"{sign} {entry[key]:g}"
        for key, sign in _BOUNDS.items()
        if key in entry and entry[key] not in _BEYOND_REASON
    ]
    return " ".join([_WORDS[entry["type"]], " and ".join(bounds)]).strip()
