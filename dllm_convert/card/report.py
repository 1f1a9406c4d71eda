"""The report: one HTML file that shows what was measured, and opens without a network."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dllm_convert.card import tables
from dllm_convert.card.charts import score_figure
from dllm_convert.card.evaluation import Evaluation
from dllm_convert.card.evaluation_curve import PARALLELISM, drawable
from dllm_convert.card.facts import Facts, collect_facts
from dllm_convert.card.groups import Group, group_probes
from dllm_convert.card.pictures import (
    ATTENTION,
    DECODING,
    DENOISING,
    LOSS,
    PICTURES,
    RATES,
    Picture,
    as_svg,
    draw_svg,
)
from dllm_convert.card.quality import Number, Quality, numbers, quality_of
from dllm_convert.card.text import duration, shown
from dllm_convert.common.disk import write_whole
from dllm_convert.common.manifest import MANIFEST_FILE, REPORT_FILE, read_manifest
from dllm_convert.common.redaction import last_part, without_paths
from dllm_convert.common.tables import Table
from dllm_convert.errors import DataError, DllmConvertError
from dllm_convert.recipe import yaml_text as recipe_yaml
from dllm_convert.recipe.loading import data_dir
from dllm_convert.verification.observe.observations import Observations

TEMPLATE = "report.html.jinja"
LARGEST_FILM = 8 << 20
"""Bytes of an animation that a page still holds."""
_FILM_COLUMNS = 32
_TABLES = {
    ATTENTION.file: tables.attention_table,
    LOSS.file: tables.loss_table,
    RATES.file: tables.rates_table,
    DECODING.file: tables.decoding_table,
}


@dataclass(frozen=True)
class Figure:
    """A picture on the page.

    Attributes:
        picture: What it shows.
        svg: The drawing.
        table: The numbers behind it, None if there are none.
        lead: A sentence above it, None for none.
    """

    picture: Picture
    svg: Markup
    table: Table | None
    lead: str | None = None


@dataclass(frozen=True)
class Page:
    """Everything the template reads; nothing in it is HTML but the drawings.

    Attributes:
        title: Name of the model.
        passed: Whether verification passed; None if there was none.
        probes: How many checks there are.
        groups: The checks by what they are about, failures first.
        quality: The verdict on quality, None of a folder that says nothing of how it was made.
        numbers: The four numbers beside it.
        film: How the sample was denoised, a GIF as a data URI; empty for none.
        facts: What the model is and where it comes from, name and value.
        figures: Pictures.
        measures: Held-out likelihoods.
        scores: What an evaluation found, with sentences on how; its curve is among the figures.
        samples: Decoded texts.
        recipe: The resolved recipe as YAML, empty if it is not known.
        seconds: Wall time of the verification.
        note: When and by what it was made.
    """

    title: str
    passed: bool | None
    probes: int
    groups: tuple[Group, ...]
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    quality: Quality | None = None
    numbers: tuple[Number, ...] = ()
    film: str = ""
    measures: Table | None = None
    scores: tuple[Table | None, tuple[str, ...]] | None = None
    samples: tuple[Mapping[str, Any], ...] = ()
    recipe: str = ""
    seconds: float | None = None
    note: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    verification: Mapping[str, Any] | None = None,
    seen: Observations | None = None,
) -> Path:
    """Write the report of a checkpoint; no model is loaded.

    Args:
        folder: The checkpoint; with a manifest, the report says how it was made.
        out: HTML file, by default report.html in the folder, which has to have a manifest then.
        verification: Report of a verification, by default that of the manifest.
        seen: What pictures are drawn from, by default what the manifest holds.

    Returns:
        Path of the file.

    Raises:
        DataError: The file cannot be written, or the manifest is missing or broken.
    """
    path = out or folder / REPORT_FILE
    foreign = out is not None and not (folder / MANIFEST_FILE).exists()
    manifest = {} if foreign else read_manifest(folder)
    if verification is not None:
        manifest = {**manifest, "verification": verification}
    try:
        write_whole(path, render_report(folder, manifest, seen))
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror})", hint="Give another --report"
        ) from error
    return path


def render_report(
    folder: Path, manifest: Mapping[str, Any], seen: Observations | None = None
) -> str:
    """Return the report as HTML; every value in it is escaped.

    Args:
        folder: The checkpoint; only its config and names of files are read.
        manifest: Content of its dllm_convert.json; of a foreign checkpoint, the verification only.
        seen: What pictures are drawn from, by default what the manifest holds.
    """
    if seen is None:
        seen = Observations.from_measurements(manifest.get("measurements") or {})
    try:
        page = _made_here(folder, collect_facts(folder, manifest), seen)
    except DllmConvertError:
        # No manifest of ours, or not a sound one: the page says what is known without it.
        page = _foreign(folder, manifest.get("verification"), seen)
    environment = Environment(
        loader=FileSystemLoader(data_dir("cards")),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=shown,
    )
    environment.filters |= {
        "duration": duration,
    }
    return environment.get_template(TEMPLATE).render(page=page, film=DENOISING)


def _made_here(folder: Path, facts: Facts, seen: Observations) -> Page:
    report, manifest, found = facts.verification or {}, facts.manifest, facts.evaluation
    scores = None
    if found is not None:
        scores = tables.scores_table(found), tuple(tables.evaluation_notes(found))
    return Page(
        title=facts.title,
        **_verdict(report),
        facts=tuple(_facts(facts)),
        figures=(*_figures(seen), *_curve(facts.evaluation)),
        quality=quality_of(facts),
        numbers=tuple(numbers(facts)),
        film=_film(folder, facts),
        measures=tables.measures_table(facts.measures) if facts.measures else None,
        scores=scores,
        samples=facts.samples,
        recipe=recipe_yaml.dump(recipe_yaml.spoken(facts.recipe)),
        note=f"dllm-convert {manifest.get('dllm_convert')}, converted {manifest.get('created')}",
    )


def _film(folder: Path, facts: Facts) -> str:
    # Inside of the page: it is one file, and loads nothing.
    if facts.animation is None:
        return ""
    path = folder / facts.animation.file
    held = path.read_bytes() if path.stat().st_size <= LARGEST_FILM else b""
    # In short lines, which browsers join: no key of anybody is found in them by chance.
    text = b64encode(held).decode()
    lines = [text[n : n + _FILM_COLUMNS] for n in range(0, len(text), _FILM_COLUMNS)]
    return "data:image/gif;base64," + "\n".join(lines) if held else ""


def _foreign(folder: Path, report: Mapping[str, Any] | None, seen: Observations) -> Page:
    from dllm_convert.common.version import __version__

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        section = config.get("diffusion") or {}
        facts = [
            ("Family", config.get("model_type")),
            ("Objective", section.get("objective")),
            ("Tokens per block", section.get("block_size")),
            ("Mask token", section.get("mask_token_id")),
        ]
    except (OSError, ValueError, AttributeError):
        facts = []
    return Page(
        title=last_part(str(folder.resolve())),
        **_verdict(report or {}),
        facts=tuple((name, str(value)) for name, value in facts if value is not None),
        figures=_figures(seen),
        note=f"verified by dllm-convert {__version__}; the folder says nothing of how it was made",
    )


def _verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    texts = ("name", "measured", "required", "detail", "origin")
    probes = [
        {
            "passed": probe.get("passed"),
            **{key: without_paths(str(probe.get(key) or "")) for key in texts},
        }
        for probe in report.get("probes") or ()
    ]
    passed = [probe["passed"] for probe in probes]
    return {
        "passed": report.get("passed"),
        "probes": len(probes),
        "groups": group_probes(probes),
        "seconds": report.get("seconds"),
        "counts": {
            "passed": passed.count(True),
            "failed": passed.count(False),
            "not run": passed.count(None),
        },
    }


def _figures(seen: Observations) -> tuple[Figure, ...]:
    leads = {ATTENTION.file: tables.attention_summary(seen)}
    return tuple(
        # Drawn by us from numbers: the only part of the page that is not escaped.
        Figure(picture, Markup(svg), _TABLES[picture.file](seen), leads.get(picture.file))  # noqa: S704
        for picture in PICTURES
        if (svg := draw_svg(picture, seen)) is not None
    )


def _curve(evaluation: Evaluation | None) -> Iterator[Figure]:
    drawn = None if evaluation is None else score_figure(drawable(evaluation.sweep))
    if evaluation is not None and drawn is not None:
        svg = Markup(as_svg(drawn, PARALLELISM))  # noqa: S704
        yield Figure(PARALLELISM, svg, tables.sweep_table(evaluation))


def _facts(facts: Facts) -> Iterator[tuple[str, str]]:
    base, plan, train, cost = facts.base, facts.plan, facts.train, facts.cost
    source = plan.get("source") or {}
    yield "Base", base.repo_id or base.file or base.name
    if base.revision or base.sha256:
        yield "Version of the base", base.revision or f"sha256 {base.sha256}"
    if base.licence.id:
        yield "Licence of the base", base.licence.name or base.licence.id
    yield "Family", facts.adapter.model_type
    if source.get("parameters"):
        yield "Parameters", f"{int(source['parameters']):,}"
    kind = {"mdlm": "masked diffusion", "bd3lm": "block diffusion"}
    yield "Objective", f"{facts.objective}, {kind.get(facts.objective, 'diffusion')}"
    if facts.block_size:
        yield "Tokens per block", str(facts.block_size)
    yield "Token shift", "kept" if facts.token_shift else "none"
    yield "Mask token", f"{facts.mask['token']}, id {facts.mask['id']} ({facts.mask['reason']})"
    if train is None or cost is None:
        yield "Training", "none: the weights are the base's"
    else:
        amount = f"{int(train['steps']):,} steps, {int(train['tokens']):,} tokens"
        device = f" on {cost.devices} of {cost.device}" if cost.device else ""
        yield "Training", f"{train['method']}, {amount}, {duration(cost.seconds)}{device}"
    if facts.data:
        yield "Text", ", ".join(facts.data.text.names)
    versions = facts.manifest.get("versions") or {}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "Needs", f"transformers {plan['min_transformers']} or newer"
