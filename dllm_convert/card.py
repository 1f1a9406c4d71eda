"""The model card: README.md of a converted checkpoint, from templates and facts of its run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dllm_convert import recipe_yaml
from dllm_convert.card_checks import check_card, check_metadata
from dllm_convert.card_facts import BILLION, Facts, collect_facts
from dllm_convert.errors import DataError
from dllm_convert.manifest import read_manifest, record_card
from dllm_convert.recipe import data_dir
from dllm_convert.sampling import DEFAULT_PROMPT

CARD_FILE = "README.md"
TEMPLATE = "model.md.jinja"
_PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
}


def write_card(folder: Path, *, overwrite: bool = True, repo_id: str | None = None) -> Path:
    """Write README.md into a converted checkpoint, and its hash into the manifest.

    Args:
        folder: The checkpoint, with its manifest.
        overwrite: Whether to replace a README.md that is there; otherwise it is kept.
        repo_id: Where it will be published; title and snippets name it.

    Returns:
        Path of README.md.

    Raises:
        DataError: The folder has no manifest, or one that is incomplete, or cannot be written; or
            the card breaks a rule of `check_card`.
    """
    manifest = read_manifest(folder)
    path = folder / CARD_FILE
    if path.exists() and not overwrite:
        return path
    text = render_card(folder, manifest, repo_id=repo_id)
    check_card(text, folder)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror})") from error
    record_card(folder)
    return path


def check_written_card(folder: Path) -> None:
    """Check the metadata of a README.md that a person wrote or edited.

    Raises:
        DataError: The Hub would refuse it.
    """
    check_metadata((folder / CARD_FILE).read_text(encoding="utf-8"), folder)


def render_card(folder: Path, manifest: Mapping[str, Any], *, repo_id: str | None = None) -> str:
    """Return the card of a checkpoint.

    Args:
        folder: The checkpoint; only names of files in it are read.
        manifest: Content of its dllm_convert.json.
        repo_id: Where it will be published, None if that is not known.

    Raises:
        DataError: The manifest lacks something that every run records.
    """
    facts = collect_facts(folder, manifest)
    template = _environment(data_dir("cards")).get_template(TEMPLATE)
    body = template.render(
        facts=facts,
        repo_id=repo_id,
        title=repo_id.rpartition("/")[2] if repo_id else facts.title,
        prompt=facts.sample["prompt"] if facts.sample else DEFAULT_PROMPT,
        recipe_yaml=recipe_yaml.dump(_spoken(facts.recipe)),
        few_tokens=facts.train is not None and int(facts.train["tokens"]) < BILLION,
    )
    text = f"---\n{_yaml(front_matter(facts))}---\n\n{body}"
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """Return the card's metadata: what is known, with the keys the Hub reads."""
    block = facts.objective == "bd3lm"
    optional = {
        "language": list(facts.base.languages),
        "license": facts.base.license,
        "base_model": facts.base.repo_id,
        "base_model_relation": "finetune" if facts.base.repo_id else None,
        "datasets": list(facts.data.names) if facts.data and facts.data.kind == "hub" else [],
    }
    return {
        **{key: value for key, value in optional.items() if value},
        "library_name": "transformers",
        "pipeline_tag": _PIPELINE_TAGS[facts.adapter.auto_class],
        "tags": [
            *("dllm-convert", "diffusion", "block-diffusion" if block else "masked-diffusion"),
            *(facts.objective, "custom_code"),
        ],
    }


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=1000)


def _spoken(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe without fields that were left empty, sections included."""
    spoken: dict[str, Any] = {}
    for key, value in recipe.items():
        kept = _spoken(value) if isinstance(value, Mapping) else value
        if kept not in (None, {}, [], ()):
            spoken[key] = list(kept) if isinstance(kept, tuple) else kept
    return spoken


def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 -- Markdown, and every fact goes through a filter below
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": _cell,
        "code": _code,
        "count": _count,
        "duration": _duration,
        "fence": _fence,
        "figures": _figures,
        "python": _python,
    }
    return environment


def _cell(value: object) -> str:
    """Make text safe inside a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _code(value: object) -> str:
    """Make an inline code span, whatever backticks the text has."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text}{ticks}"


def _fence(value: object, language: str = "") -> str:
    """Make a code block, whatever backticks the text has."""
    text = str(value).rstrip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _python(value: object) -> str:
    """Make a Python literal with double quotes where that is possible."""
    text = str(value)
    return (
        repr(text) if '"' in text or not text.isprintable() else f'"{text}"'.replace("\\", "\\\\")
    )


def _count(value: float) -> str:
    """Write a whole number with separators."""
    return f"{int(value):,}"


def _figures(value: float, digits: int = 4) -> str:
    """Write a number with a few significant digits."""
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def _duration(seconds: float) -> str:
    """Write a duration in the two largest units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
