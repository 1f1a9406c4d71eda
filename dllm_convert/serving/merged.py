"""One folder out of a base and an adapter: the sum, tensor by tensor, as the class computes it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.console import Reporter
from dllm_convert.common.disk import link, sync_tree, writing
from dllm_convert.common.json_files import load_json_object
from dllm_convert.common.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    WRITTEN_LAST,
    checkpoint_files,
    hash_files,
    read_manifest,
    write_manifest,
)
from dllm_convert.errors import DataError, IncompatibleError, VerificationError
from dllm_convert.modeling.converted_config import (
    check_converted_config,
    read_converted_config,
    read_section,
)
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.planning.layouts.registry import MERGED
from dllm_convert.recipe.recorded import recorded_recipe
from dllm_convert.serving.run import Export, refuse_full
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.materialise import materialise
from dllm_convert.source.recorded import recorded_base
from dllm_convert.source.safetensors_header import INDEX_FILE, read_checkpoint
from dllm_convert.training.adapter_files import ADAPTER

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DELTA = "token_adapter.trainable_tokens_delta"
_ASIDE = (".original_module.", ".modules_to_save.", ".token_adapter.base_layer.")
"""Copies that PEFT writes beside what it reads; the class's own sum says whether they matter."""


@dataclass
class Addends:
    """What an adapter adds to a checkpoint, or puts in the place of its tensors.

    Attributes:
        tensors: Those of the adapter, by the names of PEFT, float32.
        scale: What products of LoRA are multiplied by.
        rows: Name of a module's end to the rows of it that were trained alone.
        used: Names that were added to something.
    """

    tensors: Mapping[str, torch.Tensor]
    scale: float
    rows: Mapping[str, list[int]]
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> Addends:
        """Read an adapter.

        Raises:
            DataError: It is no LoRA adapter that `run --lora` writes.
        """
        from safetensors.torch import load_file

        config = load_json_object(folder / CONFIG)
        odd = [
            name
            for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
            if config.get(name) not in (None, False, {}, "none")
        ]
        if config.get("peft_type") != "LORA" or odd:
            what = f"{odd[0]}={config[odd[0]]}" if odd else f"peft_type={config.get('peft_type')}"
            raise DataError(
                f"{folder / CONFIG} has {what}, expected an adapter that dllm-convert run --lora "
                "--keep-adapter wrote",
                hint="Merge it with PEFT, and convert what comes of it",
            )
        return cls(
            load_file(folder / WEIGHTS),
            config["lora_alpha"] / config["r"],
            config.get("trainable_token_indices") or {},
        )

    def added(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what a tensor of the checkpoint becomes, in float32.

        Args:
            name: Its name.
            weight: Its value before training, any shape.
        """
        module = _PREFIX + name.removesuffix(".weight")
        found = weight.float()
        if (whole := self.tensors.get(_PREFIX + name)) is not None:
            self.used.add(_PREFIX + name)
            found = whole
        below, above = (f"{module}.lora_{side}.weight" for side in "AB")
        if below in self.tensors:
            self.used |= {below, above}
            # (out, rank) times (rank, in), in the order of PEFT.
            found = found + (self.tensors[above] @ self.tensors[below]) * self.scale
        if f"{module}.{_DELTA}" in self.tensors:
            import torch

            self.used.add(f"{module}.{_DELTA}")
            ids = next(ids for end, ids in self.rows.items() if module.endswith(f".{end}"))
            rows = self.tensors[f"{module}.{_DELTA}"]  # (trained rows, width)
            found = found.index_copy(0, torch.tensor(ids), rows)
        return found

    def unused(self, tied_head: str | None) -> list[str]:
        """Return tensors of the adapter that were added to nothing, copies aside."""
        aside = {_PREFIX + tied_head} if tied_head else set()
        return sorted(
            name
            for name in set(self.tensors) - self.used - aside
            if not any(part in name for part in _ASIDE)
        )


def merge(
    folder: Path,
    out: Path | None = None,
    *,
    base: str | None = None,
    reporter: Reporter | None = None,
) -> Export:
    """Write base and adapter as one converted checkpoint, and prove that it is their sum.

    Args:
        folder: What `run --lora --keep-adapter` wrote, or an adapter that was published alone.
        out: Folder to create; None: beside the other one.
        base: Folder or Hub id of the base; None: the one that the manifest names.
        reporter: Progress; None: silent.

    Raises:
        DataError: There is no adapter, or its base is not here or another one.
        IncompatibleError: Base, recipe and adapter do not belong together.
        VerificationError: What was written is not what the class computes, or fails a probe.
    """
    teller = reporter or Reporter(quiet=True)
    place = refuse_full(out or folder.with_name(f"{folder.resolve().name}-{MERGED}"))
    config = read_converted_config(folder)
    family = check_converted_config(config, folder)
    if config["diffusion"].get("acts_on") == "noisy":
        raise IncompatibleError(
            "its adapter acts on unwritten tokens only, and a sum would act on all of them",
            hint="The folder is one already: its weights are the base's, the adapter lies beside",
        )
    adapter, manifest = _adapter_of(folder), read_manifest(folder)
    addends = Addends.read(adapter)
    source = recorded_base(manifest, base)
    plan = make_plan(
        recorded_recipe(folder).model_copy(
            update={"source": source.given, "revision": source.revision}
        ),
        source,
    )
    if plan.mask.id != read_section(config).mask_token_id:
        raise IncompatibleError(
            f"from {source.given} the mask would be id {plan.mask.id}, and the adapter's is "
            f"{read_section(config).mask_token_id}",
            hint="Give the base it was made from with --base",
        )
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".dllm-convert-", dir=place.parent) as scratch,
            writing(partial, 4 * source.parameters),
        ):
            untrained = _untrained(plan, source, Path(scratch) / "untrained", teller)
            partial.mkdir(parents=True)
            _write(untrained, addends, family, partial, teller)
            checked = _compare(untrained, adapter, family, partial, folder, teller)
            _document(folder, partial, manifest, checked, teller)
            sync_tree(partial)
        if place.exists():
            place.rmdir()
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    ways = {path.name: "rewritten" for path in place.glob("*.safetensors")}
    return Export(place, MERGED, ("transformers",), ways, checked, ())


def _adapter_of(folder: Path) -> Path:
    """Return where the adapter's files are: in the folder, or one below."""
    for place in (folder / ADAPTER, folder):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            return place
    raise DataError(
        f"{folder} has no {CONFIG} and {WEIGHTS}, in it or in {ADAPTER}/",
        hint="Give what `run --lora R --keep-adapter` wrote, or the folder of an adapter that was "
        "published alone",
    )


def _untrained(plan: ConversionPlan, source: SourceInfo, out: Path, reporter: Reporter) -> Path:
    """Write the conversion as it was before its training."""
    from dllm_convert.weights.run import adapt

    base = materialise(source, reporter).folder
    with reporter.task("adapt"):
        adapt(plan, base, out, reporter, light=True)
    return out


def _tensors(folder: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield file, name and value of every tensor, a file after the other."""
    from safetensors import safe_open

    for file in sorted(read_checkpoint(folder)):
        with safe_open(folder / file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                yield file, name, handle.get_tensor(name)


def _write(
    untrained: Path, addends: Addends, family: Adapter, out: Path, reporter: Reporter
) -> None:
    """Write the sums, each in the type that the base is stored in."""
    from safetensors.torch import save_file

    files: dict[str, dict[str, torch.Tensor]] = {}
    headers = read_checkpoint(untrained)
    with reporter.task("add", total=sum(len(held.entries) for held in headers.values())) as task:
        for file, name, weight in _tensors(untrained):
            held = files.setdefault(file, {})
            held[name] = addends.added(name, weight).to(weight.dtype).contiguous()
            if len(held) == len(headers[file].entries):
                save_file(files.pop(file), out / file, metadata={"format": "pt"})
            task.advance()
    if (untrained / INDEX_FILE).is_file():
        shutil.copyfile(untrained / INDEX_FILE, out / INDEX_FILE)
    tied = all(family.head not in held.entries for held in headers.values())
    lost = addends.unused(family.head if tied else None)
    if lost:
        raise DataError(
            f"the adapter has {lost[0]}, which belongs to no tensor of the base",
            hint="It was trained on another model",
        )


def _compare(
    untrained: Path, adapter: Path, family: Adapter, out: Path, folder: Path, reporter: Reporter
) -> dict[str, str]:
    """Compare what was written with what PEFT and the class compute, and with weights beside it.

    Raises:
        VerificationError: A tensor differs in a bit; or from the weights beside it visibly.
    """
    import torch

    with reporter.task("compare with the class"):
        sums = _by_class(untrained, adapter, family)
    count = 0
    for _, name, found in _tensors(out):
        if not torch.equal(found, sums[name].to(found.dtype)):
            raise VerificationError(
                f"{name} is not the sum that {family.diffusion_class} computes",
                hint="Nothing was written. Report it, with the version of peft",
            )
        count += 1
    checked = {"sum": f"{count} tensors equal to what PEFT and the class compute, bit for bit"}
    if adapter == folder:
        return checked
    beside = {name: value for _, name, value in _tensors(folder)}
    apart = 0.0
    for _, name, found in _tensors(out):
        other = beside.pop(name, None)
        if other is None or other.shape != found.shape:
            raise VerificationError(
                f"{name} is not in {folder.name} as the base has it",
                hint="Base and adapter do not belong together: give the right one with --base",
            )
        apart = max(apart, float((other.double() - found.double()).abs().max()))
    if apart > family.tolerance:
        raise VerificationError(
            f"the sum is up to {apart:.2g} away from the weights of {folder.name}, expected at "
            f"most {family.tolerance:g}",
            hint="Base and adapter do not belong together: give the right one with --base",
        )
    told = "equal, bit for bit" if not apart else f"at most {apart:.1e} away"
    return checked | {f"weights of {folder.name}": told}


def _by_class(untrained: Path, adapter: Path, family: Adapter) -> Mapping[str, torch.Tensor]:
    """Return the tensors of base and adapter put together by PEFT, in float32."""
    from peft import PeftModel

    from dllm_convert.modeling.loading import load_model

    model = load_model(untrained, family)
    tied = model.config.tie_word_embeddings
    whole: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    if tied:
        whole.get_output_embeddings().weight = whole.get_input_embeddings().weight
    found: Mapping[str, torch.Tensor] = whole.state_dict()
    return found


def _document(
    folder: Path,
    out: Path,
    manifest: Mapping[str, Any],
    checked: dict[str, str],
    reporter: Reporter,
) -> None:
    """Lay config, tokenizer and code beside the weights; verify, and write manifest and card.

    Raises:
        VerificationError: A probe failed.
    """
    from dllm_convert.card.readme import write_card
    from dllm_convert.verification import verify_checkpoint

    left_out = {MANIFEST_FILE, CARD_FILE, REPORT_FILE, CONFIG, WEIGHTS, INDEX_FILE}
    for name in checkpoint_files(folder):
        own = "/" not in name and name not in left_out and not name.endswith(".safetensors")
        if own or name.startswith("additional_chat_templates/"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            link(folder / name, out / name)
    kept = {key: value for key, value in manifest.items() if key not in ("adapter_only", "card")}
    write_manifest(out, kept | {"files": hash_files(out, exclude=WRITTEN_LAST)})
    report = verify_checkpoint(out, reporter=reporter).as_dict()
    if not report["passed"]:
        failed = [probe["name"] for probe in report["probes"] if probe["passed"] is False]
        raise VerificationError(
            f"the sum failed {', '.join(failed)}",
            hint="Nothing was written. The adapter may be of another model",
        )
    write_manifest(out, read_manifest(out) | {"verification": report})
    write_card(out)
    ran = sum(probe["passed"] is True for probe in report["probes"])
    checked["verification"] = f"{ran} probes passed"
