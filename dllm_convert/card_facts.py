"""What a model card may say: facts of one run, taken from its manifest and its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from dllm_convert.adapters import Adapter, get_adapter
from dllm_convert.errors import DataError
from dllm_convert.source_folder import LICENCE_FILES
from dllm_convert.training.documents import FILE_SUFFIXES

BILLION = 1_000_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Base:
    """What was converted.

    Attributes:
        name: Short name for titles.
        repo_id: Hub id, None if it did not come from the Hub.
        revision: Commit of the Hub repository.
        file: Name of the GGUF file or of the folder, where it is not from the Hub.
        sha256: SHA-256 of a GGUF file.
        license: Licence id, None if unknown.
        licence_files: Names of the base's licence files in the folder.
        languages: Language codes, empty if unknown.
    """

    name: str
    repo_id: str | None
    revision: str | None
    file: str | None
    sha256: str | None
    license: str | None
    licence_files: tuple[str, ...]
    languages: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """One line of the held-out table.

    Attributes:
        what: What was measured.
        nats: Nats per token.
        stderr: Its standard error, None if unknown.
        perplexity: exp(nats), None if it is beyond a float.
        tokens: Tokens it was measured on.
    """

    what: str
    nats: float
    stderr: float | None
    perplexity: float | None
    tokens: int


@dataclass(frozen=True)
class Data:
    """Training and held-out text.

    Attributes:
        kind: pydoc, files or hub.
        names: File names or the dataset id; never a path of the machine it was made on.
        facts: Counts.
    """

    kind: Literal["pydoc", "files", "hub"]
    names: tuple[str, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """Everything the templates read.

    Attributes:
        base: What was converted.
        adapter: Its family.
        objective: mdlm or bd3lm.
        block_size: Tokens per block, None for mdlm.
        token_shift: Whether the autoregressive alignment is kept.
        mask: The mask-token decision, as the plan recorded it.
        plan: The plan.
        recipe: The resolved recipe, without paths of the machine it was made on.
        train: What training did, None if there was none.
        data: Text used, None if none was.
        measures: Held-out likelihoods.
        sample: A decoded text, None if there is none.
        verification: The report, None if verification never ran.
        has_chat_template: Whether the tokenizer has one.
        manifest: The manifest.
    """

    base: Base
    adapter: Adapter
    objective: str
    block_size: int | None
    token_shift: bool
    mask: Mapping[str, Any]
    plan: Mapping[str, Any]
    recipe: Mapping[str, Any]
    train: Mapping[str, Any] | None
    data: Data | None
    measures: tuple[Measure, ...]
    sample: Mapping[str, Any] | None
    verification: Mapping[str, Any] | None
    has_chat_template: bool
    manifest: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Heading of the card."""
        block = f"-{self.block_size}" if self.block_size else ""
        return f"{self.base.name}-{self.objective}{block}"

    @property
    def failed(self) -> tuple[Mapping[str, Any], ...]:
        """Probes that failed."""
        return tuple(probe for probe in self._probes if probe["passed"] is False)

    @property
    def skipped(self) -> tuple[Mapping[str, Any], ...]:
        """Probes that did not run."""
        return tuple(probe for probe in self._probes if probe["passed"] is None)

    @property
    def _probes(self) -> list[Mapping[str, Any]]:
        return list((self.verification or {}).get("probes") or ())

    @property
    def gap(self) -> float | None:
        """How far the bound after training lies above the base's own NLL, in nats per token."""
        found = {measure.what: measure.nats for measure in self.measures}
        after, base = found.get(MEASURES["nelbo_after"]), found.get(MEASURES["ar_nll"])
        return None if after is None or base is None else after - base


MEASURES = {
    "nelbo_before": "NELBO before training",
    "nelbo_after": "NELBO after training",
    "ar_nll": "NLL of the base, autoregressive",
}


def collect_facts(folder: Path, manifest: Mapping[str, Any]) -> Facts:
    """Read the facts of a run.

    Args:
        folder: The checkpoint, for the files that lie in it.
        manifest: Content of its dllm_convert.json.

    Raises:
        DataError: The manifest lacks something that every run records.
    """
    try:
        plan, source, recipe = manifest["plan"], manifest["source"], manifest["recipe"]
        measurements = manifest.get("measurements") or {}
        return Facts(
            base=_base(folder, source),
            adapter=get_adapter(str(source["model_type"])),
            objective=plan["target"],
            block_size=plan["block_size"],
            token_shift=plan["token_shift"],
            mask=plan["mask"],
            plan=plan,
            recipe=_without_paths(recipe, source),
            train=measurements.get("train"),
            data=_data(measurements.get("data")),
            measures=_measures(measurements),
            sample=manifest.get("sample"),
            verification=manifest.get("verification"),
            has_chat_template=(folder / "chat_template.jinja").is_file(),
            manifest=manifest,
        )
    except KeyError as error:
        raise DataError(
            f"the manifest of {folder} has no {error.args[0]!r}, which every run records",
            hint="Convert the model again with this version of dllm-convert",
        ) from error


def _base(folder: Path, source: Mapping[str, Any]) -> Base:
    repo_id = source.get("repo_id")
    # Neither form of separator may carry a path of somebody's machine into a published card.
    file = re.split(r"[/\\]", str(source["given"]).rstrip("/\\"))[-1]
    sha256 = (source.get("fingerprint") or {}).get("sha256")
    names = {path.name for pattern in LICENCE_FILES for path in folder.glob(pattern)}
    languages = source.get("language") or ()
    return Base(
        name=repo_id.rpartition("/")[2] if repo_id else _stem(file),
        repo_id=repo_id,
        revision=source.get("revision"),
        file=None if repo_id else file,
        sha256=sha256 if isinstance(sha256, str) else None,
        license=source.get("license"),
        licence_files=tuple(sorted(names)),
        languages=(languages,) if isinstance(languages, str) else tuple(languages),
    )


def _stem(file: str) -> str:
    return file.removesuffix(".gguf") or "model"


def _data_kind(source: str, recorded: str | None) -> Literal["pydoc", "files", "hub"]:
    if source == "pydoc":
        return "pydoc"
    if recorded in ("files", "hub"):
        return "hub" if recorded == "hub" else "files"
    looks_like_id = _HUB_ID.fullmatch(source) and PurePath(source).suffix not in FILE_SUFFIXES
    return "hub" if looks_like_id and not Path(source).exists() else "files"


def _data_names(source: str, kind: str) -> tuple[str, ...]:
    if kind != "files":
        return (source,)
    return tuple(part.rstrip("/").rpartition("/")[2] for part in source.split(",") if part)


def _data(facts: Mapping[str, Any] | None) -> Data | None:
    if not facts:
        return None
    kind = _data_kind(str(facts["source"]), facts.get("kind"))
    return Data(kind, _data_names(str(facts["source"]), kind), facts)


def _without_paths(recipe: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with local paths cut down to their last part."""
    data = dict(recipe.get("data") or {})
    if "source" in data:
        kind = _data_kind(str(data["source"]), None)
        data["source"] = ",".join(_data_names(str(data["source"]), kind))
    given = source.get("repo_id") or re.split(r"[/\\]", str(recipe["source"]).rstrip("/\\"))[-1]
    return {**recipe, "source": given, "data": data}


def _measures(measurements: Mapping[str, Any]) -> tuple[Measure, ...]:
    found = []
    for key, what in MEASURES.items():
        value = measurements.get(key)
        if value:
            nats, stderr = float(value["nats_per_token"]), value.get("stderr")
            known = stderr is not None and math.isfinite(stderr)
            perplexity = math.exp(nats) if nats < 700 else None
            found.append(
                Measure(what, nats, stderr if known else None, perplexity, int(value["tokens"]))
            )
    return tuple(found)
