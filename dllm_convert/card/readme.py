"""The model card: README.md of a converted checkpoint, from templates and facts of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.card import text as card_text
from dllm_convert.card.checks import check_metadata
from dllm_convert.card.facts import BILLION, Facts, collect_facts
from dllm_convert.card.groups import group_probes
from dllm_convert.card.metadata import dump_front_matter, front_matter
from dllm_convert.card.quality import glance_table, quality_of
from dllm_convert.card.tables import measures_table, scores_table, sweep_table
from dllm_convert.common.foreign_files import read_text
from dllm_convert.common.manifest import CARD_FILE, read_manifest, record_card
from dllm_convert.errors import DataError
from dllm_convert.recipe import yaml_text as recipe_yaml
from dllm_convert.recipe.loading import data_dir
from dllm_convert.sampling import DEFAULT_PROMPT

TEMPLATE = "model.md.jinja"


def write_card(folder: Path, *, overwrite: bool = True, repo_id: str | None = None) -> Path:
    """Write README.md into a converted checkpoint, and its hash into the manifest.

    Args:
        folder: The checkpoint, with its manifest.
        overwrite: Whether to replace a README.md that is there; otherwise it is kept.
        repo_id: Where it will be published; title and snippets name it.

    Returns:
        Path of README.md.

    Raises:
        DataError: The folder has no manifest, or one that is incomplete, or cannot be written.
    """
    manifest = read_manifest(folder)
    path = folder / CARD_FILE
    if path.exists() and not overwrite:
        return path
    text = render_card(folder, manifest, repo_id=repo_id)
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
    check_metadata(read_text(folder / CARD_FILE), folder)


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
    title = repo_id.rpartition("/")[2] if repo_id else facts.title
    body = card_text.render(
        data_dir("cards"),
        TEMPLATE,
        facts=facts,
        quality=quality_of(facts),
        glance=glance_table(facts),
        groups=group_probes(facts.probes),
        measures=measures_table(facts.measures),
        scores=facts.evaluation and scores_table(facts.evaluation),
        sweep=facts.evaluation and sweep_table(facts.evaluation),
        repo_id=repo_id,
        title=title,
        prompt=_prompt(facts),
        recipe_yaml=recipe_yaml.dump(recipe_yaml.spoken(facts.recipe)),
        few_tokens=facts.train is not None and int(facts.train["tokens"]) < BILLION,
        code_links=", ".join(f"[{name}]({name})" for name in facts.code_files),
        lora=facts.train is not None and facts.train["method"] == "lora",
    )
    return f"{dump_front_matter(front_matter(facts, title))}\n{body}"


def _prompt(facts: Facts) -> str:
    """Return a text to go on from: that of the sample, where it is no question."""
    first = next(iter(facts.samples), None)
    return DEFAULT_PROMPT if first is None or first["chat"] else str(first["prompt"])
