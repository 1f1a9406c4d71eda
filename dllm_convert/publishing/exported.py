"""An export for an engine on the Hub: beside its conversion, which it names as its base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dllm_convert.card.licences import check_publication, rules_for
from dllm_convert.card.metadata import dump_front_matter
from dllm_convert.common.console import Reporter
from dllm_convert.common.disk import link, write_whole
from dllm_convert.common.hub_names import LICENCES, is_model_id, language_codes
from dllm_convert.common.json_files import write_config
from dllm_convert.common.manifest import CARD_FILE, EXPORT_FILE, MANIFEST_FILE, git_blob
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.common.version import __version__
from dllm_convert.common.work_folder import WORK, locked
from dllm_convert.errors import DataError, RequestError, VerificationError
from dllm_convert.publishing.export_record import read_record
from dllm_convert.publishing.options import PushOptions, PushResult
from dllm_convert.publishing.push import upload
from dllm_convert.publishing.remote import RemoteState
from dllm_convert.publishing.repository import DEFAULT_REVISION, full_id
from dllm_convert.publishing.scan import check_staged
from dllm_convert.publishing.staged import Staged
from dllm_convert.publishing.staging import check_recorded, published_names

_WHOLE_TYPES = (None, "F32", "F16", "BF16")
"""Types of a file's matrices that are the conversion's numbers; any other is a quantisation."""


def is_export(folder: Path) -> bool:
    """Whether a folder is what `export` wrote for an engine."""
    return (folder / EXPORT_FILE).is_file() and not (folder / MANIFEST_FILE).is_file()


@dataclass
class StagedExport(Staged):
    """An export that is to be published; what its record says stands for a manifest."""

    record_file: ClassVar[str] = EXPORT_FILE

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of its dllm_export.json, its card as git names it."""
        return read_record(self.folder / EXPORT_FILE)

    def takes_the_place(self, remote: RemoteState, revision: str) -> bool:
        """Whether a new branch still holds the conversion, which stays on its own."""
        conversion = MANIFEST_FILE in remote.files and EXPORT_FILE not in remote.files
        return conversion and revision != DEFAULT_REVISION


def push_export(folder: Path, options: PushOptions, reporter: Reporter) -> PushResult:
    """Publish an export: in a repository of its own, or as a revision of its conversion's.

    Args:
        folder: What `export` wrote.
        options: Where and how; `base_model` is the conversion's repository.
        reporter: Progress.

    Raises:
        RequestError: An option is not for exports, or nothing says what it was made from.
        VerificationError: The conversion was not verified.
        IncompatibleError: The licence of its base does not allow it as asked.
        DataError: The folder is not what was exported.
        HubError: See `upload`.
    """
    for name in ("adapter_only", "max_shard_size"):
        if getattr(options, name):
            raise RequestError(f"`{name}` is for conversions, not for exports", argument=name)
    record = read_record(folder / EXPORT_FILE)
    source = record["source"]
    if not source.get("verified") and not options.force_unverified:
        raise VerificationError(
            f"the conversion {source['name']} was not verified when it was exported",
            hint="Verify it and export it again; --force-unverified publishes it as it is",
        )
    options = replace(options, repo_id=full_id(options.repo_id))
    base_model = _base_model(options)
    rules = rules_for(source.get("license"), source.get("license_name"))
    for warning in check_publication(
        rules, options.repo_id, public=options.public is True, files=record["files"]
    ):
        reporter.warn(warning)
    with locked(folder):
        scratch = folder / WORK / "push"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            with quiet_libraries():
                staged = _stage(folder, scratch / "files", record, base_model, options)
                return upload(staged, options, scratch, reporter)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _base_model(options: PushOptions) -> str:
    """Return the conversion's repository.

    Raises:
        RequestError: Nobody said which it is.
    """
    given, revision = options.base_model, options.revision or DEFAULT_REVISION
    if given is not None and not is_model_id(given):
        raise RequestError(f"`base_model` is {given!r}, expected namespace/name")
    if given is not None:
        return given
    if options.create_pr or revision == DEFAULT_REVISION:
        raise RequestError(
            "an export names the conversion that it was made from, and nothing says where that is",
            hint="Give `base_model`, as namespace/name, or push to a `revision` of its repository",
            argument="base_model",
        )
    return options.repo_id


def _stage(
    folder: Path, out: Path, record: Mapping[str, Any], base_model: str, options: PushOptions
) -> StagedExport:
    """Link what is recorded, and put metadata before the text of README.md.

    Raises:
        DataError: A file is missing, changed, or not of the export.
    """
    recorded: dict[str, str] = dict(record["files"])
    names = published_names(folder, {*recorded, EXPORT_FILE})
    missing = sorted(set(recorded) - set(names))
    if missing:
        raise DataError(f"{folder} lacks {missing[0]}, which was exported", hint="Export it again")
    out.mkdir(parents=True)
    for name in names:
        check_recorded(folder, name, recorded)
        link(folder / name, out / name)
    text = (out / CARD_FILE).read_text(encoding="utf-8")
    (out / CARD_FILE).unlink()
    write_whole(out / CARD_FILE, dump_front_matter(_metadata(record, base_model)) + "\n" + text)
    (out / EXPORT_FILE).unlink()
    card = {"blob": git_blob(out / CARD_FILE)}
    files = {name: digest for name, digest in recorded.items() if name != CARD_FILE}
    kept = {**record, "files": files, "card": card, "base_model": base_model}
    write_config(out / EXPORT_FILE, kept)
    check_staged(out)
    engines = " and ".join(record["engines"])
    name = options.repo_id.rpartition("/")[2]
    said = f"{base_model} for {engines}, exported with dllm-convert {__version__}."
    return StagedExport(out, folder, name, said, verified=bool(record["source"].get("verified")))


def _metadata(record: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """Return what stands before the card's text."""
    source = record["source"]
    licence = source.get("license")
    other = licence is not None and (licence not in LICENCES or licence == "other")
    quantised = record.get("outtype") not in _WHOLE_TYPES
    languages = source.get("language") or ()
    values = {
        "language": list(language_codes(tuple(languages))),
        "license": "other" if other else licence,
        "license_name": (source.get("license_name") or licence) if other else None,
        "license_link": source.get("license_link") if other else None,
        "base_model": base_model,
        "base_model_relation": "quantized" if quantised else None,
        "pipeline_tag": "text-generation",
        "tags": ["dllm-convert", "diffusion", record["target"], *_engine_tags(record["engines"])],
    }
    return {key: value for key, value in values.items() if value}


def _engine_tags(engines: list[str]) -> list[str]:
    return [name.casefold() for name in engines]
