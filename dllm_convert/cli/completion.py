"""What a shell offers when Tab is pressed: names of recipes, presets, fields and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path


def _names(folder: str) -> list[str]:
    """Return the names of shipped recipes; their files are not read."""
    package = Path(str(files("dllm_convert")))
    shipped = package / "_data" / "recipes"
    base = shipped if shipped.is_dir() else package.parent / "recipes"
    return sorted(path.stem for path in (base / folder).glob("*.yaml"))


def recipes(incomplete: str) -> list[str]:
    """Return the recipes that begin so."""
    return [name for name in _names("") if name.startswith(incomplete)]


def presets(incomplete: str) -> list[str]:
    """Return the presets that begin so."""
    return [name for name in _names("presets") if name.startswith(incomplete)]


def sources(incomplete: str) -> list[str]:
    """Return the recipes, folders, recipe files and GGUF files that begin so."""
    return [*recipes(incomplete), *_places(incomplete)]


def _places(incomplete: str) -> Iterator[str]:
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") or not incomplete else typed.parent
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for path in found:
        shown = f"{path}/" if path.is_dir() else str(path)
        fits = path.is_dir() or path.suffix in (".yaml", ".gguf")
        if fits and shown.startswith(incomplete) and not path.name.startswith("."):
            yield shown


def fields(incomplete: str) -> list[str]:
    """Return the fields of a recipe that begin so, up to where their value begins."""
    from dllm_convert.recipe.fields import all_fields

    return [f"{name}=" for name in all_fields() if name.startswith(incomplete)]


def tasks(incomplete: str) -> list[str]:
    """Return the tasks that begin so, behind those that are typed already.

    Those of lm-eval are looked up by the names of their folders and files, which are close to all
    of them: reading every task takes seconds.
    """
    before, comma, begun = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in sorted(_tasks()) if name.startswith(begun)]


def _tasks() -> set[str]:
    from importlib.util import find_spec

    own = Path(str(files("dllm_convert"))) / "evaluation" / "tasks"
    found = {path.stem for path in own.glob("*.yaml")}
    harness = find_spec("lm_eval")
    for place in () if harness is None else harness.submodule_search_locations or ():
        folder = Path(place) / "tasks"
        found |= {path.stem for path in (*folder.iterdir(), *folder.glob("*/*.yaml"))}
    return {name for name in found if not name.startswith(("_", "."))}
