"""YAML as recipes use it: no silent booleans, dates or octals, no repeated keys, line numbers.

PyYAML follows YAML 1.1, where `no` is false, `1:30` is ninety and `2e-5` is a string. Recipes are
read with the rules of YAML 1.2, where each of these is what it looks like.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from dllm_convert.common.shown_text import acts, json_safe
from dllm_convert.errors import IncompatibleError

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NUMBER_STARTS = list("-+.0123456789")
MAX_LEVELS = 20
"""Recipes have three."""
_MAX_DIGITS = 100
_FLOAT_TAG = "tag:yaml.org,2002:float"
_INT_TAG = "tag:yaml.org,2002:int"
_TEXT_TAG = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """SafeLoader that resolves plain scalars as YAML 1.2 does and refuses repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping whose keys are distinct texts, with the line of one that is not."""
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be the name of a field"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in keys:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(key.value)
            key.tag = _TEXT_TAG
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Build a decimal number; what overflows to infinity is an error."""
        if len(node.value) > _MAX_DIGITS:
            problem = f"a number of {len(node.value):,} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        value = float(node.value) if node.tag == _FLOAT_TAG else int(node.value)
        if not math.isfinite(value):
            problem = f"{node.value} is not a finite number"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(_INT_TAG, re.compile(f"^{_INT.pattern}$"), _NUMBER_STARTS)
_Loader.add_implicit_resolver(_FLOAT_TAG, re.compile(f"^{_FLOAT.pattern}$"), _NUMBER_STARTS)
_Loader.add_constructor(_INT_TAG, _Loader.construct_number)
_Loader.add_constructor(_FLOAT_TAG, _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose text reads the same under YAML 1.1 and 1.2: either's traps are quoted."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list below their key."""
        super().increase_indent(flow, False)

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Write a text; one with characters that act stands in quotes, where escapes are read."""
        return self.represent_scalar(_TEXT_TAG, text, style='"' if acts(text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver(_FLOAT_TAG, re.compile(f"^{_FLOAT.pattern}$"), _NUMBER_STARTS)


def parse_mapping(text: str, origin: str) -> dict[str, Any]:
    """Read a YAML document that must be a mapping with text keys.

    Args:
        text: The document.
        origin: File name, for the messages.

    Raises:
        IncompatibleError: The text is no YAML (with the line), or no such mapping.
    """
    value = _parse(text, origin)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise IncompatibleError(
            f"{origin} holds a {type(value).__name__}, expected fields such as `target: bd3lm`"
        )
    return value


def parse_value(text: str, origin: str) -> Any:
    """Read the right-hand side of `--set key=value`.

    Raises:
        IncompatibleError: The text is no YAML.
    """
    return _parse(text, origin)


def dump(value: Mapping[str, Any]) -> str:
    """Write a mapping as YAML, keys in their order; what would act on a reader is escaped."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return json_safe(text)


def check_structure(text: str) -> None:
    """Check what a YAML document is built of, before anything of it is built.

    Nine aliases of aliases are a thousand million values, and a value that holds itself has no end.

    Raises:
        yaml.MarkedYAMLError: It has aliases, tags or too many levels.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        problem = _problem(event)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_LEVELS:
            problem = f"more than {MAX_LEVELS} levels"
        if problem is not None:
            where: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=where)


def _problem(event: Any) -> str | None:
    """Return what a recipe may not have at this place."""
    if isinstance(event, yaml.AliasEvent):
        return f"the alias *{event.anchor}: write the value out where it is meant"
    if getattr(event, "tag", None) not in (None, "!"):
        return f"the tag {event.tag}: values are texts, numbers, lists and sections"
    if isinstance(event, yaml.ScalarEvent) and any("\ud800" <= c <= "\udfff" for c in event.value):
        return "a text with half a character"
    return None


def _parse(text: str, origin: str) -> Any:
    try:
        check_structure(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}, line {mark.line + 1}" if mark else origin
        problem = error.problem or error.context or "cannot be read"
        raise IncompatibleError(f"{where}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise IncompatibleError(f"{origin}: not valid YAML: {problem}") from error


def spoken(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe without fields that were left empty, sections included."""
    said: dict[str, Any] = {}
    for key, value in recipe.items():
        kept = spoken(value) if isinstance(value, Mapping) else value
        if kept not in (None, {}, [], ()):
            said[key] = list(kept) if isinstance(kept, tuple) else kept
    return said
