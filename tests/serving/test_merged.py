"""A base and an adapter as one folder: the sum that the class computes, and no other base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from conversion import convert
from factory import make_source
from safetensors.torch import load_file, save_file
from tiny_runs import recipe

import dllm_convert as dc
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import MANIFEST_FILE, hash_files, read_manifest, write_manifest
from dllm_convert.errors import DataError, IncompatibleError, RequestError, VerificationError
from dllm_convert.modeling.loading import load_model
from dllm_convert.pipeline.api.conversion import convert_recipe
from dllm_convert.planning.conversion import plan_as_dict, source_facts
from dllm_convert.publishing.adapter import adapter_checkpoint
from dllm_convert.serving import merged
from dllm_convert.serving.merged import merge
from dllm_convert.training.setup import make_trainable
from dllm_convert.training.writing import write_trained

QUIET = Reporter(quiet=True)


def trained(base: Path, folder: Path, embeddings: str, target: str = "bd3lm") -> Path:
    """Write a checkpoint, and its adapter, of which everything that trains has moved."""
    training = {
        "method": "lora",
        "keep_adapter": True,
        "lora": {"rank": 4, "embeddings": embeddings},
    }
    untrained = folder.with_name(f"{folder.name}-untrained")
    plan = convert(base, untrained, target, training=training, method="lora")
    model = make_trainable(load_model(untrained, plan.adapter), plan.adapter, plan.recipe.training)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    write_trained(model, untrained, folder, plan)
    manifest = {
        "format_version": 1,
        "source": source_facts(plan),
        "recipe": plan.recipe.model_dump(mode="json"),
        "plan": plan_as_dict(plan),
        "files": hash_files(folder, exclude=(MANIFEST_FILE,)),
    }
    write_manifest(folder, json.loads(json.dumps(manifest)))
    return folder


@pytest.fixture
def undocumented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the weights written and compared, and nothing laid beside them."""
    monkeypatch.setattr(merged, "_document", lambda *_: None)


CASES = [
    ("llama", "full", False),
    ("llama", "mask_row", False),
    ("mistral", "full", True),
    ("qwen2", "mask_row", True),
    ("qwen3", "full", True),
    ("bert", "full", None),
    ("roberta", "mask_row", None),
]


@pytest.mark.usefixtures("undocumented")
@pytest.mark.parametrize(("family", "embeddings", "tied"), CASES)
def test_the_sum_is_what_the_class_computes(
    family: str, embeddings: str, tied: bool | None, tmp_path: Path, source_cache: SourceFactory
) -> None:
    target = "mdlm" if "bert" in family else "bd3lm"
    folder = trained(source_cache(family, tied=tied), tmp_path / "a", embeddings, target)
    made = merge(folder)
    assert made.checked[f"weights of {folder.name}"] == "equal, bit for bit"
    assert made.checked["sum"].endswith("bit for bit")
    old, new = (load_file(place / "model.safetensors") for place in (folder, made.path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)

    alone = tmp_path / "alone"
    adapter_checkpoint(folder, alone, QUIET)
    again = merge(alone, tmp_path / "again")
    assert (again.path / "model.safetensors").read_bytes() == (
        made.path / "model.safetensors"
    ).read_bytes()


def _scaled(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    config["lora_alpha"] *= 2


def _extra(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)


def _other(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.norm.weight"] += 1.0


FAULTS: dict[str, tuple[Callable[..., None], type[Exception], str]] = {
    "another kind of adapter": (
        lambda config, _: config.update(peft_type="IA3"), DataError, "peft_type=IA3",
    ),
    "a scale that grows with the rank": (
        lambda config, _: config.update(use_rslora=True), DataError, "use_rslora=True",
    ),
    "another scale": (_scaled, VerificationError, "away from the weights of"),
    "a layer too many": (_extra, DataError, r"layers\.9.*belongs to no tensor"),
    "another norm": (_other, VerificationError, "away from the weights of"),
}  # fmt: skip


@pytest.mark.usefixtures("undocumented")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_this_adapter_is_refused_and_nothing_is_left(
    fault: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    change, kind, reason = FAULTS[fault]
    folder = trained(source_cache("llama"), tmp_path / "a", "full")
    place = folder / "adapter"
    config = json.loads((place / "adapter_config.json").read_text())
    weights = load_file(place / "adapter_model.safetensors")
    change(config, weights)
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, place / "adapter_model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=reason):
        merge(folder)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("undocumented")
def test_another_base_is_refused(tmp_path: Path, source_factory: SourceFactory) -> None:
    base = source_factory("llama")
    folder = trained(base, tmp_path / "a", "full")
    other = make_source(tmp_path / "other", "llama", seed=5)
    with pytest.raises(DataError, match="not the base that was converted"):
        merge(folder, base=str(other))
    longer = make_source(tmp_path / "longer", "llama", vocab_padding=64)
    with pytest.raises((DataError, IncompatibleError)):
        merge(folder, base=str(longer))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="is not here any more") as caught:
        merge(folder)
    assert "--base" in str(caught.value)
    assert merge(folder, base=str(moved)).checked["sum"]


def test_what_a_sum_that_is_written_wrong_says(
    tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(source_cache("llama"), tmp_path / "a", "full")
    plain = merged.Addends.added

    def faulty(self: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
        found = plain(self, name, weight)
        return found + 1e-6 if name.endswith("0.mlp.up_proj.weight") else found

    monkeypatch.setattr(merged.Addends, "added", faulty)
    with pytest.raises(VerificationError, match="not the sum that DiffusionLlamaForCausalLM"):
        merge(folder)


def test_arguments_that_belong_to_others_are_refused(tmp_path: Path) -> None:
    for argument in ({"data": "a.txt"}, {"prove": True}):
        with pytest.raises(RequestError, match="is about engines' layouts"):
            dc.export(tmp_path, "merged", **argument)
    with pytest.raises(RequestError, match="`base` is for `to=merged`"):
        dc.export(tmp_path, "sdar", base="x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IncompatibleError, match="not a diffusion checkpoint"):
        dc.export(tmp_path, "merged")


@pytest.mark.slow
def test_a_run_and_its_adapter_alone_become_the_same_checkpoint(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    asked = recipe(
        source_cache("llama"), method="lora", steps=2, keep_adapter=True, learning_rate=1e-3
    )
    done = convert_recipe(asked, tmp_path / "run", QUIET)
    alone = tmp_path / "alone"
    adapter_checkpoint(done.path, alone, QUIET)
    made = dc.export(alone, "merged", tmp_path / "one")
    manifest = read_manifest(made.path)
    assert manifest["verification"]["passed"]
    assert "adapter_only" not in manifest
    weights = "model.safetensors"
    assert (made.path / weights).read_bytes() == (done.path / weights).read_bytes()
    assert not list(made.path.glob("adapter*"))
    assert "library_name: transformers" in (made.path / "README.md").read_text()
    model = dc.load(made.path)
    assert model is not None
    shutil.rmtree(done.path)
