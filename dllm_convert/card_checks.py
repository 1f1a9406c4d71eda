"""Is a card one the Hub takes and a reader can use? Checked before a byte is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dllm_convert.errors import DataError

LICENCES = frozenset(
    (
        *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m"),
        *("bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause"),
        *("bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "cc", "cc0-1.0", "cc-by-2.0"),
        *("cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
        *("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
        *("cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cdla-permissive-2.0"),
        *("creativeml-openrail-m", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1"),
        *("eupl-1.2", "gemma", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0"),
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "mit", "mpl-2.0"),
        *("ms-pl", "ncsa", "odc-by", "openrail", "openrail++", "osl-3.0", "other", "pddl"),
        *("postgresql", "unlicense", "wtfpl", "zlib"),
    )
)
"""Licence ids the Hub knows (its documentation of repository licences, read on 2026-11-23)."""

RELATIONS = ("adapter", "merge", "quantized", "finetune")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})*|code|multilingual")
_FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_FENCE = re.compile(r"^( {0,3}>? ?)(`{3,}|~{3,})(.*)$")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]*)(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"(#{1,6})\s+(.*)")
_PLACEHOLDER = re.compile(
    r"(?i:\[?more information needed\]?)|\b(TODO|FIXME|None|nan|undefined)\b|\{\{|\}\}|\{%"
)

_TEXT = "a non-empty text"
_KEYS: dict[str, str] = {
    "language": "language codes",
    "license": "a licence id the Hub knows",
    "license_name": _TEXT,
    "license_link": "a link, or the name of a file of the repository",
    "library_name": _TEXT,
    "pipeline_tag": _TEXT,
    "tags": "a list of texts",
    "datasets": "dataset ids of the Hub",
    "base_model": "a model id of the Hub",
    "base_model_relation": f"one of {', '.join(RELATIONS)}",
    "model-index": "results as the Hub reads them",
    "metrics": "a list of texts",
    "widget": "a list",
    "thumbnail": _TEXT,
    "new_version": "a model id of the Hub",
    "inference": "true or false",
    "extra_gated_prompt": _TEXT,
    "extra_gated_fields": "a mapping",
}


def check_card(text: str, folder: Path) -> None:
    """Check a card's metadata and its Markdown.

    Args:
        text: README.md.
        folder: The checkpoint, for what the card links to.

    Raises:
        DataError: Something is wrong; every problem is named.
    """
    _raise([*_metadata_problems(text, folder), *_body_problems(_body(text), folder)], folder)


def check_metadata(text: str, folder: Path) -> None:
    """Check the metadata only, as for a card that a person wrote.

    Args:
        text: README.md.
        folder: The checkpoint.

    Raises:
        DataError: The Hub would refuse it or not read it; every problem is named.
    """
    _raise(list(_metadata_problems(text, folder)), folder)


def _raise(problems: list[str], folder: Path) -> None:
    if problems:
        raise DataError(
            f"the model card of {folder} is not sound: {'; '.join(problems)}",
            hint="Correct README.md, or write it anew with `dllm-convert card`",
        )


def _body(text: str) -> str:
    found = _FRONT.match(text)
    return text[found.end() :] if found else text


def _metadata_problems(text: str, folder: Path) -> Iterator[str]:
    found = _FRONT.match(text)
    if found is None:
        yield "it does not begin with metadata between two lines of ---"
        return
    try:
        content = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        yield f"its metadata is not YAML ({str(error).splitlines()[0]})"
        return
    if not isinstance(content, dict):
        yield "its metadata is not a mapping"
        return
    for key, value in content.items():
        if key not in _KEYS:
            yield f"metadata {key!r} is not a key the Hub reads"
        elif not _fits(key, value, folder):
            yield f"metadata {key}: {value!r} is not {_KEYS[key]}"
    if content.get("license") == "other" and not content.get("license_name"):
        yield "metadata license: other needs license_name"
    if "base_model_relation" in content and "base_model" not in content:
        yield "metadata base_model_relation needs base_model"


def _fits(key: str, value: Any, folder: Path) -> bool:
    if key == "license":
        return isinstance(value, str) and value in LICENCES
    if key == "license_link":
        return isinstance(value, str) and (
            value.startswith("https://") or (folder / value).is_file()
        )
    if key == "language":
        return all(isinstance(v, str) and _LANGUAGE.fullmatch(v) for v in _listed(value))
    if key in ("base_model", "datasets", "new_version"):
        return all(isinstance(v, str) and _HUB_ID.fullmatch(v) for v in _listed(value))
    if key == "base_model_relation":
        return value in RELATIONS
    if key in ("tags", "metrics"):
        return isinstance(value, list) and all(isinstance(v, str) and v for v in value)
    if key == "model-index":
        return _is_model_index(value)
    if _KEYS[key] == _TEXT:
        return isinstance(value, str) and bool(value.strip())
    return True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_model_index(value: Any) -> bool:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        name, results = model_index_to_eval_results(value)
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    numbers = all(isinstance(result.metric_value, int | float) for result in results)
    return bool(name) and numbers and all(isinstance(r, EvalResult) for r in results)


def _body_problems(body: str, folder: Path) -> Iterator[str]:
    lines, open_fence = _without_code(body)
    if open_fence:
        yield "a code block is not closed"
    anchors = set(_anchors(lines))
    for number, line in enumerate(lines):
        if found := _PLACEHOLDER.search(_without_spans(line)):
            yield f"it holds {found[0]!r}, a placeholder"
        for image, alt, target in _LINK.findall(_without_spans(line)):
            yield from _link_problems(image, alt, target, anchors, folder)
        yield from _table_problems(lines, number)
    yield from _empty_sections(lines)


def _without_code(body: str) -> tuple[list[str], bool]:
    """Return the lines with code blocks blanked out, and whether one was left open."""
    lines, fence = [], ""
    for line in body.splitlines():
        found = _FENCE.match(line)
        if fence:
            closes = found is not None and found[2].startswith(fence) and not found[3].strip()
            fence = "" if closes else fence
            lines.append("\0")
        elif found:
            fence = found[2]
            lines.append("\0")
        else:
            lines.append(line)
    return lines, bool(fence)


def _without_spans(line: str) -> str:
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)


def _anchors(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if found := _HEADING.fullmatch(line):
            words = re.sub(r"[^\w\- ]", "", found[2].strip().lower())
            yield words.replace(" ", "-")


def _link_problems(
    image: str, alt: str, target: str, anchors: set[str], folder: Path
) -> Iterator[str]:
    if image and not alt.strip():
        yield f"the picture {target} has no text for those who cannot see it"
    if target.startswith("#"):
        if target[1:] not in anchors:
            yield f"it links to {target}, which no heading has"
    elif not target.startswith(("https://", "mailto:")):
        local = target.partition("#")[0]
        inside = local and not Path(local).is_absolute() and ".." not in Path(local).parts
        if not inside or not (folder / local).exists():
            yield f"it links to {target or 'nothing'}, which the folder does not have"


def _table_problems(lines: list[str], number: int) -> Iterator[str]:
    if number == 0 or not lines[number].startswith("|") or not lines[number - 1].startswith("|"):
        return
    cells, above = (len(re.findall(r"(?<!\\)\|", lines[n])) for n in (number, number - 1))
    if cells != above:
        yield f"a table's row has {cells - 1} cells, the one above {above - 1}"


def _empty_sections(lines: list[str]) -> Iterator[str]:
    headings = [(n, found) for n, line in enumerate(lines) if (found := _HEADING.fullmatch(line))]
    for index, (number, found) in enumerate(headings):
        following = headings[index + 1] if index + 1 < len(headings) else None
        end = following[0] if following else len(lines)
        deeper = following is not None and len(following[1][1]) > len(found[1])
        if not deeper and not any(line.strip() for line in lines[number + 1 : end]):
            yield f"the section {found[2]!r} is empty"
