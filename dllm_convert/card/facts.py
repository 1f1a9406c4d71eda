"""What a model card may say: facts of one run, taken from its manifest and its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.adapters import Adapter, adapter_of
from dllm_convert.card.base import Base, Data, base_of, data_kind, data_names, data_of
from dllm_convert.card.cost import Cost, cost_of
from dllm_convert.card.evaluation import Evaluation, evaluation_of
from dllm_convert.card.licences import conforming_name
from dllm_convert.card.pictures import DENOISING, PICTURES, Picture
from dllm_convert.card.tables import MEASURES, Measure
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.manifest import MANIFEST_FILE, REPORT_FILE
from dllm_convert.common.manifest_form import check_form
from dllm_convert.common.redaction import last_part, without_paths
from dllm_convert.modeling.bundle import CODE_FILES
from dllm_convert.recipe.splits import mixture_line
from dllm_convert.source.fit import is_tied
from dllm_convert.verification.report import files_only

BILLION = 1_000_000_000


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
        cost: What training cost, None if there was none.
        data: Text used, None if none was.
        measures: Held-out likelihoods.
        evaluation: Scores beside the base's, None if there are none.
        samples: Decoded texts, the first of which was filmed; none of a run without the model.
        verification: The report, None if verification never ran.
        pictures: Pictures in the folder.
        animation: How the sample was denoised, None if that was not recorded.
        keeps_base: Whether the weights are the base's, and an adapter acts on noisy tokens only.
        causal_drafts: Whether noisy tokens see of their block only what stands before them.
        behind_cache: Whether they stand behind a copy of the base's cache, and nothing is opened.
        exponents: w of each class of words, from the frequent to the rare, where the noise schedule
            was learnt.
        adapter_only: Whether the folder holds a LoRA adapter instead of the merged weights.
        code_files: The modelling code that the folder brings.
        has_report: Whether report.html lies in the folder.
        tied: Whether the output head is the embedding.
        has_chat_template: Whether the tokenizer has one.
        closing: Tokens that the tokenizer puts behind every text.
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
    cost: Cost | None
    data: Data | None
    measures: tuple[Measure, ...]
    evaluation: Evaluation | None
    samples: tuple[Mapping[str, Any], ...]
    verification: Mapping[str, Any] | None
    pictures: tuple[Picture, ...]
    animation: Picture | None
    keeps_base: bool
    causal_drafts: bool
    behind_cache: bool
    exponents: tuple[float, ...]
    adapter_only: bool
    code_files: tuple[str, ...]
    has_report: bool
    tied: bool
    has_chat_template: bool
    closing: int
    manifest: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Heading of the card where no repository gives one; a name the base's licence allows."""
        block = f"-{self.block_size}" if self.block_size else ""
        name = f"{self.base.name}-{self.objective}{block}{'-lora' if self.adapter_only else ''}"
        return conforming_name(self.base.licence.rules, name) or name

    @property
    def encoder(self) -> bool:
        """Whether the base is a masked language model."""
        return self.adapter.attention == "bidirectional"

    @property
    def failed(self) -> tuple[Mapping[str, Any], ...]:
        """Probes that failed."""
        return tuple(probe for probe in self.probes if probe["passed"] is False)

    @property
    def skipped(self) -> tuple[Mapping[str, Any], ...]:
        """Probes that did not run."""
        return tuple(probe for probe in self.probes if probe["passed"] is None)

    @property
    def files_only(self) -> bool:
        """Whether its files were verified, and the model was never run."""
        return files_only(self.verification)

    @property
    def probes(self) -> tuple[Mapping[str, Any], ...]:
        """All probes of the verification."""
        return tuple((self.verification or {}).get("probes") or ())

    @property
    def gap(self) -> float | None:
        """How far the bound after training lies above the base's own NLL, in nats per token."""
        after, base = self.measure("nelbo_after"), self.measure("ar_nll")
        return after.nats - base.nats if after and base else None

    def measure(self, key: str) -> Measure | None:
        """Return a measure by its key in the manifest, None if it was not measured."""
        return next((measure for measure in self.measures if measure.key == key), None)


def collect_facts(folder: Path, manifest: Mapping[str, Any]) -> Facts:
    """Read the facts of a run.

    Args:
        folder: The checkpoint, for the files that lie in it.
        manifest: Content of its dllm_convert.json.

    Raises:
        DataError: The manifest lacks something that every run records.
    """
    check_form(manifest, folder / MANIFEST_FILE, whole=True)
    plan, source, recipe = manifest["plan"], manifest["source"], manifest["recipe"]
    measurements = manifest.get("measurements") or {}
    config = _read(folder / "config.json")
    adapter = adapter_of(config | {"model_type": source["model_type"]})
    return Facts(
        base=base_of(folder, manifest),
        adapter=adapter,
        objective=plan["target"],
        block_size=plan["block_size"],
        token_shift=plan["token_shift"],
        mask=plan["mask"],
        plan=plan,
        recipe=_reproducible(recipe, source),
        train=measurements.get("train"),
        cost=cost_of(manifest),
        data=data_of(measurements.get("data"), recipe),
        measures=_measures(measurements),
        evaluation=evaluation_of(folder, manifest.get("evaluation")),
        samples=tuple(_samples(manifest.get("sample"))),
        verification=_verification(manifest.get("verification")),
        pictures=tuple(picture for picture in PICTURES if (folder / picture.file).is_file()),
        animation=DENOISING if (folder / DENOISING.file).is_file() else None,
        keeps_base=(diffusion_section(config) or {}).get("acts_on") == "noisy",
        causal_drafts=(diffusion_section(config) or {}).get("draft") == "causal",
        behind_cache=(diffusion_section(config) or {}).get("behind") == "cache",
        exponents=tuple((diffusion_section(config) or {}).get("noise_exponents", ())),
        adapter_only=manifest.get("adapter_only") is True,
        code_files=tuple(name for name in CODE_FILES if (folder / name).is_file()),
        has_report=(folder / REPORT_FILE).is_file(),
        tied=is_tied(config, adapter),
        has_chat_template=(folder / "chat_template.jinja").is_file(),
        closing=_closing(folder, adapter),
        manifest=manifest,
    )


def _closing(folder: Path, adapter: Adapter) -> int:
    """How many tokens the tokenizer puts behind every text; an encoder's one, unless recorded."""
    recorded = _read(folder / "generation_config.json").get("closing_token_ids")
    return len(recorded) if isinstance(recorded, list) else int(adapter.attention != "causal")


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file; nothing if it is missing or broken, which is verification's business."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _reproducible(recipe: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with the base pinned, and local paths cut down to their last part."""
    data = dict(recipe.get("data") or {})
    for key in ("source", "held_out_source"):
        if data.get(key):
            kind = data_kind(str(data[key]))
            data[key] = ",".join(data_names(str(data[key]), kind))
    if data.get("mixture"):
        cut = [
            {**text, "source": ",".join(data_names(text["source"], data_kind(text["source"])))}
            for text in data["mixture"]
        ]
        data |= {"mixture": cut, "source": mixture_line(cut)}
    repo_id = source.get("repo_id")
    pinned = {
        "source": repo_id or last_part(str(recipe["source"])),
        "revision": source.get("revision") if repo_id else None,
    }
    return {**recipe, **pinned, "data": data}


def _verification(report: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the report without paths of the machine it was made on."""
    if report is None:
        return None
    texts = ("measured", "required", "detail")
    probes = [
        {**probe, **{key: without_paths(str(probe.get(key) or "")) for key in texts}}
        for probe in report.get("probes") or ()
    ]
    return {**report, "probes": probes}


def _measures(measurements: Mapping[str, Any]) -> tuple[Measure, ...]:
    found = []
    for key, what in MEASURES.items():
        value = measurements.get(key)
        if value:
            nats = math.inf if value["nats_per_token"] is None else float(value["nats_per_token"])
            stderr = value.get("stderr")
            known = stderr is not None and math.isfinite(stderr)
            perplexity = math.exp(nats) if nats < 700 else None
            tokens = int(value["tokens"])
            found.append(Measure(key, what, nats, stderr if known else None, perplexity, tokens))
    return tuple(found)


def _samples(sample: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield every text that was decoded, with what earlier versions did not write down."""
    for one in () if sample is None else (sample, *sample.get("more", ())):
        yield {"chat": False, "base": None, **one}
