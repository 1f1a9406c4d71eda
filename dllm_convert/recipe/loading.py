"""What to do: a recipe file, the presets it inherits, flags and `--set`, as one validated value."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dllm_convert.common.foreign_files import MAX_TEXT_BYTES, check_file
from dllm_convert.common.nearest import nearest_place
from dllm_convert.errors import IncompatibleError, TypedFieldError
from dllm_convert.recipe import yaml_text as recipe_yaml
from dllm_convert.recipe.budget import paced
from dllm_convert.recipe.contradiction import UnsoundError
from dllm_convert.recipe.engines import NEEDS
from dllm_convert.recipe.fields import describe_problem, field_path, fields_of, sections
from dllm_convert.recipe.inherited import Fetch, handed_down
from dllm_convert.recipe.precedence import NAMES, forgotten
from dllm_convert.recipe.schema import Recipe
from dllm_convert.recipe.splits import mixture_line
from dllm_convert.recipe.texts import fields_of_text

DEFAULT_PRESET = "small-budget"
"""The preset of a Hub id, folder or file that no recipe describes."""

DEFAULT_BLOCK_SIZE = 32
"""Fast-dLLM v2's (arXiv 2509.26328), where `--to bd3lm` comes with no size from recipe or flag."""

COMMAND_LINE = "the command line"
INHERITS = "inherits"


@dataclass(frozen=True)
class RecipeEntry:
    """What `dllm-convert recipes` shows of a recipe.

    Attributes:
        name: Its name.
        presets: What it inherits.
        recipe: What it resolves to.
    """

    name: str
    presets: tuple[str, ...]
    recipe: Recipe


def data_dir(kind: Literal["recipes", "cards"]) -> Path:
    """Return the folder of the shipped recipes or card templates.

    In an installed wheel it is package data; in a source checkout it stands beside the package.
    """
    package = Path(str(files("dllm_convert")))
    shipped = package / "_data" / kind
    return shipped if shipped.is_dir() else package.parent / kind


def list_recipes() -> tuple[RecipeEntry, ...]:
    """Return the shipped recipes, by name."""
    return tuple(
        RecipeEntry(name, _presets_of(path), load_recipe(name, overrides={}))
        for name, path in sorted(_shipped("").items())
    )


def _presets_of(path: Path) -> tuple[str, ...]:
    fields = recipe_yaml.parse_mapping(_read(path), str(path))
    return _inherited(fields.get(INHERITS), path)


def load_recipe(
    source: str,
    *,
    overrides: Mapping[str, Any],
    preset: str | None = None,
    fetch: Fetch | None = None,
) -> Recipe:
    """Resolve what the user typed into a complete recipe.

    Args:
        source: Name of a shipped recipe, path of a `.yaml` recipe, or else a Hub id, folder or
            `.gguf` file, for which the preset `small-budget` applies.
        overrides: Dotted field to value; they win over the file, which wins over its presets.
        preset: Preset that was asked for: it wins over the file, and takes the place of
            `small-budget`.
        fetch: How a source on the Hub is asked if it is a conversion, which hands down what nobody
            typed; None asks none. A folder is looked into anyway.

    Raises:
        IncompatibleError: No such recipe; broken YAML; an unknown field, a wrong type or a value
            out of range; presets that inherit each other.
        HubError: The source was to be asked for, and cannot be.
    """
    layers = _Layers()
    path = _find(source)
    if path is not None:
        layers.add_file(path)
    elif preset is None:
        layers.add_file(_shipped("presets")[DEFAULT_PRESET], preset=True)
    if preset is not None:
        layers.add_file(_named_preset(preset), preset=True, typed=True)
    if path is None:
        layers.add({"source": source}, COMMAND_LINE)
    layers.add(overrides, COMMAND_LINE)
    # Two sources that contradict each other are refused by whoever let them be typed.
    one = path is not None or overrides.get("source", source) == source
    layers.check_typed()
    layers.hand_down(fetch if one else None)
    return layers.validate()


def amend_recipe(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return a resolved recipe with some fields set anew.

    Args:
        recipe: The recipe.
        overrides: Dotted field to value, as in `load_recipe`.

    Raises:
        IncompatibleError: A field is unknown, or no such value.
    """
    layers = _Layers()
    layers.add(recipe.model_dump(mode="json"), "the recipe")
    layers.add(overrides, COMMAND_LINE)
    return layers.validate()


def dump_recipe(recipe: Recipe) -> str:
    """Write a resolved recipe as YAML, every field spelt out; loading it gives an equal recipe."""
    return recipe_yaml.dump(recipe.model_dump(mode="json"))


@dataclass
class _Layers:
    """Fields collected from presets, file and command line, the later over the earlier.

    Attributes:
        values: Dotted path to value and where it was written, for the messages.
        ranks: Dotted path to the number of the layer that wrote it.
        typed: Paths that somebody wrote for this conversion: not those of inherited presets.
        order: Where fields were written, the earliest first.
    """

    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    typed: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    _layers: int = 0

    def add_file(
        self,
        path: Path,
        *,
        preset: bool = False,
        typed: bool = False,
        chain: tuple[Path, ...] = (),
    ) -> None:
        """Add a recipe or preset file, what it inherits first.

        Args:
            path: The file.
            preset: Whether another recipe inherits it: its name and description stay behind.
            typed: Whether the user named the preset.
            chain: The files that led here, outermost first.
        """
        path = path.resolve()
        if path in chain:
            names = " -> ".join(step.stem for step in (*chain, path))
            raise IncompatibleError(f"{path}: recipes inherit each other: {names}")
        fields = recipe_yaml.parse_mapping(_read(path), str(path))
        for name in _inherited(fields.pop(INHERITS, None), path):
            inherited = _find_preset(name, path)
            self.add_file(inherited, preset=True, typed=typed, chain=(*chain, path))
        if preset:
            fields.pop("name", None)
            fields.pop("description", None)
        else:
            fields.setdefault("name", path.stem)
        self.add(fields, str(path), typed=typed or not preset)

    def check_typed(self) -> None:
        """Refuse what is wrong with the command line alone, before anybody is asked for more.

        Raises:
            TypedFieldError: A field that was typed is none, or has no such value.
        """
        try:
            deepcopy(self).validate()
        except TypedFieldError:
            raise
        except IncompatibleError:
            pass  # What the source hands down may mend it.

    def hand_down(self, fetch: Fetch | None) -> None:
        """Take from a source that is a conversion what nobody asked to be otherwise."""
        void = self._void()
        source, revision = (
            None if name in void else self.values.get(name, (None, ""))[0]
            for name in ("source", "revision")
        )
        if not isinstance(source, str) or not isinstance(revision, str | None):
            return  # The schema says so.
        fields = handed_down(source, revision, fetch=fetch)
        fields = {path: value for path, value in fields.items() if path not in self.typed}
        target = fields.get("target", self.values.get("target", (None, ""))[0])
        if target != "bd3lm":
            fields.pop("block_size", None)
            if "block_size" not in self.typed:
                self.values.pop("block_size", None)
        self.order.insert(0, f"{source}/config.json")
        for path, value in fields.items():
            self._put(path, value, f"{source}/config.json")
            self.ranks[path] = 0  # Broader fields that were typed beat it.

    def add(self, fields: Mapping[str, Any], origin: str, *, typed: bool = True) -> None:
        """Add fields, nested or dotted, written at `origin`."""
        flat = _with_texts(dict(_flatten(fields)), origin)
        self._layers += 1
        self.order.append(origin)
        if flat.get("target") == "mdlm" and "block_size" not in flat:
            # The size belonged to the bd3lm that this layer replaces.
            self.values.pop("block_size", None)
        references = flat.get("references")
        if isinstance(references, list) and origin != COMMAND_LINE:
            # A recipe rests on its presets' sources as well as its own.
            earlier, _ = self.values.get("references", ([], origin))
            if all(
                isinstance(r, list) and all(isinstance(x, str) for x in r)
                for r in (earlier, references)
            ):
                flat["references"] = list(dict.fromkeys([*earlier, *references]))
        for path, value in flat.items():
            self._put(path, value, origin)
        self.typed |= {*flat} if typed else set()

    def _put(self, path: str, value: Any, origin: str) -> None:
        """Set a leaf; what an earlier layer wrote below or above it is thereby replaced."""
        for known in list(self.values):
            if known.startswith(f"{path}.") or path.startswith(f"{known}."):
                del self.values[known]
        if path not in NAMES or path not in self.values or self.values[path][0] != value:
            self.ranks[path] = self._layers
        self.values[path] = (value, origin)

    def _void(self) -> set[str]:
        """Return the fields that a broader one of a later layer makes void."""
        said = {path for path, (value, _) in self.values.items() if value is not None}
        return forgotten({path: self.ranks[path] for path in said})

    def _choose_for_engine(self) -> None:
        """Set what the engine of `serve` asks for, but where it was said otherwise since.

        A field that somebody wrote beside `serve`, or later, is left for the rules to refuse.
        """
        engine, origin = self.values.get("serve", (None, ""))
        rank = self.ranks.get("serve", 0)
        if not isinstance(engine, str):
            return  # Nothing is asked for; or the schema says what could be.
        for path, need in NEEDS.get(engine, {}).items():
            said = path in self.typed and self.ranks.get(path, -1) >= rank
            if path in self.values and (said or need.met_by(self.values[path][0])):
                continue
            self._put(path, need.value, origin)
            self.ranks[path] = rank
            if need.value == "mdlm" and self.ranks.get("block_size", -1) < rank:
                # The size belonged to the bd3lm that this replaces.
                self.values.pop("block_size", None)

    def validate(self) -> Recipe:
        """Check every field against the schema, and all of them against each other.

        Raises:
            IncompatibleError: A field is unknown or no such value, or two contradict each other;
                it says where that was written.
        """
        self._choose_for_engine()
        for path in self._void():
            del self.values[path]
        bd3lm = self.values.get("target", (None,))[0] == "bd3lm"
        if bd3lm and self.values.get("block_size", (None,))[0] is None:
            self.values["block_size"] = (DEFAULT_BLOCK_SIZE, "recipe")
        try:
            # Strict JSON: a list is a tuple, but "8" is no number and `true` is not 1.
            recipe = Recipe.model_validate_json(json.dumps(self._nested()), strict=True)
        except ValidationError as error:
            found = error.errors(include_url=False)
            typed = [one for one in found if self._origin(field_path(one)) == COMMAND_LINE]
            problem, *rest = [*typed, *(one for one in found if one not in typed)]
            if problem["type"] == "value_error":
                broken = problem["ctx"]["error"].found
                # What the command line alone says is wrong with every recipe.
                alone = {self._origin(path) for path in broken.fields} == {COMMAND_LINE}
                kind = TypedFieldError if alone else IncompatibleError
                raise kind(
                    f"{self._latest(broken.fields)}: {broken.message}", hint=broken.hint
                ) from error
            path = field_path(problem)
            others = {field_path(other) for other in rest} - {path}
            more = f" (and {len(others)} more)" if others else ""
            section = path.rpartition(".")[0]
            here = ", ".join(fields_of(section))
            hint = f"Fields of {section or 'a recipe'}: {here}"
            # What is wrong on the command line is wrong with every recipe and checkpoint.
            origin = self._origin(path)
            kind = TypedFieldError if origin == COMMAND_LINE else IncompatibleError
            raise kind(
                f"{origin}: {describe_problem(problem)}{more}",
                hint=hint if problem["type"] == "extra_forbidden" else None,
            ) from error
        return paced(recipe, 1)

    def _origin(self, path: str) -> str:
        below = [known for known in self.values if known == path or known.startswith(f"{path}.")]
        if below:
            return self.values[below[0]][1]
        # What is missing is missing where most is said.
        return next((one for one in reversed(self.order) if one != COMMAND_LINE), "recipe")

    def _latest(self, fields: Iterable[str]) -> str:
        """Return where the last written of some fields was: that is what broke a rule."""
        origins = [self.values[path][1] for path in fields if path in self.values]
        return next((origin for origin in reversed(self.order) if origin in origins), "recipe")

    def _nested(self) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for path, (value, _) in self.values.items():
            *parents, leaf = path.split(".")
            node = root
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return root


def _with_texts(flat: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the fields of a layer with what its `data.source` or `data.mixture` stands for.

    Raises:
        IncompatibleError: The source can be read in two ways.
    """
    source, mixture = flat.get("data.source"), flat.get("data.mixture")
    if mixture:
        return {"data.source": mixture_line(mixture) or "mixture", **flat}
    if not isinstance(source, str):
        return flat  # The schema says so, if it is something else.
    try:
        named = {f"data.{name}": value for name, value in fields_of_text(source).items()}
    except UnsoundError as error:
        kind = TypedFieldError if origin == COMMAND_LINE else IncompatibleError
        raise kind(f"{origin}: {error.found.message}", hint=error.found.hint) from error
    twice = {name for name in named if flat.get(name, named[name]) != named[name]} - {"data.source"}
    for name in sorted(twice):
        kind = TypedFieldError if origin == COMMAND_LINE else IncompatibleError
        raise kind(
            f"{origin}: {name} is {flat[name]}, and data.source says {named[name]}",
            hint="Say it once",
        )
    return flat | named


def _shipped(folder: str) -> dict[str, Path]:
    paths = (data_dir("recipes") / folder).glob("*.yaml")
    return {path.stem: path for path in paths}


def same_name_warning(recipe: Recipe) -> str | None:
    """Return what to know where a shipped recipe and a folder here have the same name."""
    recipes, folder = _shipped(""), Path(recipe.source).expanduser()
    if recipe.name in recipes and Path(recipe.name).is_dir() and recipe.source != recipe.name:
        return (
            f"there is a folder {recipe.name} here too, and the recipe of that name was taken: "
            f"./{recipe.name} means the folder"
        )
    if folder.name in recipes and folder.is_dir() and folder.resolve().parent == Path.cwd():
        return (
            f"the folder {folder.name} was taken; {folder.name} alone, without a path, means the "
            "recipe of that name"
        )
    return None


def _find(source: str) -> Path | None:
    """Return the recipe file that `source` means, or None if it is a checkpoint itself."""
    recipes = _shipped("")
    if source in recipes:
        return recipes[source]
    if source.endswith((".yaml", ".yml")):
        return Path(source)
    if "/" in source or source.endswith(".gguf") or (source and Path(source).exists()):
        return None
    if source in _shipped("presets"):
        raise IncompatibleError(
            f"{source} is a preset, expected a recipe, a Hub id, a folder or a .gguf file",
            hint=f"Give a source with --preset {source}, or write a recipe file with `source:` and "
            f"`inherits: {source}`",
        )
    near = nearest_place(source) if source else None
    known = recipes if near is None else (str(near), *recipes)
    raise TypedFieldError(
        f"no recipe, folder or file is called {source!r}{_did_you_mean(source, known)}",
        hint="List the recipes with `dllm-convert recipes`; write a Hub id as owner/name",
    )


def _find_preset(name: str, inheriting: Path) -> Path:
    """Return the file that an entry of `inherits` means: a preset, a recipe or a path."""
    if name.endswith((".yaml", ".yml")):
        return inheriting.parent / name
    known = _shipped("") | _shipped("presets")
    if name not in known:
        raise IncompatibleError(
            f"{inheriting}: inherits an unknown preset {name!r}{_did_you_mean(name, known)}",
            hint=f"Presets: {', '.join(sorted(_shipped('presets')))}; or a path ending in .yaml",
        )
    return known[name]


def _named_preset(name: str) -> Path:
    presets = _shipped("presets")
    if name not in presets:
        raise TypedFieldError(
            f"there is no preset {name!r}{_did_you_mean(name, presets)}",
            hint=f"Presets: {', '.join(sorted(presets))}",
        )
    return presets[name]


def _inherited(value: Any, path: Path) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise IncompatibleError(f"{path}: inherits is {value!r}, expected a list of preset names")
    return tuple(names)


def _read(path: Path) -> str:
    try:
        check_file(path, MAX_TEXT_BYTES)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = [file.name for end in ("*.yaml", "*.yml") for file in path.parent.glob(end)]
        near = _did_you_mean(path.name, beside)
        hint = "List the shipped recipes with `dllm-convert recipes`"
        raise TypedFieldError(f"there is no recipe file {path}{near}", hint=hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise IncompatibleError(f"the recipe file {path} cannot be read: {error}") from error


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.5)
    return f", nearest: {', '.join(by_folded[match] for match in close)}" if close else ""


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of every leaf; an empty section says nothing."""
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}.")
        elif value is not None or path not in sections():
            yield path, value
