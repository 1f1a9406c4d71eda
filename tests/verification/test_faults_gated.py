"""Gated folders: sound ones pass every probe, and each fault is caught by the probe for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import ADAPTER, FAMILIES, gated_folder
from planting import WEIGHTS, edit_json, edit_tensors, failed

from dllm_convert.common.manifest import hash_files, write_manifest
from dllm_convert.modeling.published import gated as published
from dllm_convert.modeling.published import modeling
from dllm_convert.verification import GROUPS, verify_checkpoint
from dllm_convert.verification.bytes import verify_folder
from dllm_convert.verification.catalogue import CATALOGUE, GATED

LIGHT = ("files", "tokens", "gated", "base")


@pytest.fixture(scope="module")
def cases(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Return the gated folder of a family, not to be written into, and its base."""
    root, made = tmp_path_factory.mktemp("gated"), {}

    def get(family: str, draft: str = "auto", norms: bool = False) -> tuple[Path, Path]:
        place = f"{family}-{draft}-{norms}"
        if place not in made:
            made[place] = root / place, source_cache(family)
            lora = {"rank": 4, "acts_on": "noisy", "noisy_norms": norms}
            training = {"method": "lora", "lora": lora}
            gated_folder(*reversed(made[place]), draft=draft, training=training)
        return made[place]

    return get


@pytest.fixture
def llama(cases: Any, tmp_path: Path) -> tuple[Path, Path]:
    folder, base = cases("llama")
    return Path(shutil.copytree(folder, tmp_path / "llama")), base


@pytest.mark.parametrize(
    ("family", "draft", "norms"),
    [*((family, "auto", False) for family in FAMILIES), ("qwen3", "causal", True)],
)
def test_a_sound_folder_passes_every_probe(
    family: str, draft: str, norms: bool, cases: Any, tmp_path: Path
) -> None:
    folder, base = cases(family, draft, norms)
    folder = Path(shutil.copytree(folder, tmp_path / family))
    write_manifest(folder, {"format_version": 1, "files": hash_files(folder)})
    groups = [name for name in GROUPS if name != "portability"]
    report = verify_checkpoint(folder, against=base, untrained=False, groups=groups)
    assert [f"{p.name}: {p.measured} {p.detail}" for p in report.failed] == []
    passed = {probe.name for probe in report.probes if probe.passed}
    assert set(GATED) <= passed
    # The base's weights are compared though an adapter was trained.
    assert {"base-config", "base-tensors", "base-logits", "mask-row", "packed", "cache"} <= passed
    aside = {"quality", "token-shift", "chat-template"}
    aside |= {name for name in CATALOGUE if name.startswith("portable")}
    assert set(CATALOGUE) - passed <= aside


@pytest.mark.slow
def test_a_stranger_loads_it_with_its_code_and_without(llama: tuple[Path, Path]) -> None:
    report = verify_checkpoint(llama[0], groups=["portability"], untrained=False)
    passed = {probe.name for probe in report.probes if probe.passed}
    assert {"portable", "portable-stock", "portable-version"} <= passed


def test_from_the_files_alone(llama: tuple[Path, Path]) -> None:
    from dllm_convert.common.console import Reporter

    folder, base = llama
    recipe = {"training": {"method": "lora"}}
    write_manifest(folder, {"format_version": 1, "files": hash_files(folder), "recipe": recipe})
    report = verify_folder(folder, base, Reporter(quiet=True))
    assert {p.name for p in report.probes if p.passed} == {"weights", "base-tensors", "hashes"}
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    report = verify_folder(folder, base, Reporter(quiet=True))
    assert {"base-tensors", "hashes"} == {probe.name for probe in report.failed}


def check(llama: tuple[Path, Path], *groups: str, untrained: bool = False) -> set[str]:
    folder, base = llama
    return failed(folder, groups or LIGHT, against=base, untrained=untrained)


def test_an_adapter_that_acts_on_clean_tokens(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def everywhere(self: Any, layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + layer.lora_B(layer.lora_A(inputs[0]))

    monkeypatch.setattr(published.LowRank, "__call__", everywhere)
    # `gated-clean` compares clean with clean, and all of it is as wrong.
    assert {"gated-base", "base-logits"} <= check(llama)


def test_a_clean_token_that_sees_noise(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaky(*arguments: Any, **settings: Any) -> Any:
        seen = published.gated_mask(*arguments, **settings)
        return seen | torch.ones_like(seen)

    monkeypatch.setattr(modeling, "gated_mask", leaky)
    assert check(llama) == {"gated-clean", "gated-attention"}


def test_a_noisy_block_that_is_not_open(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*arguments: Any, **_: Any) -> Any:
        return published.gated_mask(*arguments, causal_drafts=True)

    monkeypatch.setattr(modeling, "gated_mask", closed)
    assert check(llama) == {"gated-attention"}


def test_an_adapter_that_does_nothing(llama: tuple[Path, Path]) -> None:
    folder, base = llama

    def empty(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    edit_tensors(folder, empty, ADAPTER)
    assert check(llama) == {"gated-adapter"}
    untrained = verify_checkpoint(folder, against=base, untrained=True, groups=LIGHT)
    assert untrained.passed
    assert {p.name: p.passed for p in untrained.probes}["gated-adapter"] is None


def test_a_mask_vector_of_nothing(llama: tuple[Path, Path]) -> None:
    def empty(tensors: dict[str, torch.Tensor]) -> None:
        next(value for name, value in tensors.items() if "mask_vector" in name).zero_()

    edit_tensors(llama[0], empty, ADAPTER)
    assert check(llama) == {"mask-row"}


def test_a_base_that_was_changed(llama: tuple[Path, Path]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(llama[0], lambda tensors: tensors[name].mul_(1.001), WEIGHTS)
    assert {"base-tensors", "base-logits"} <= check(llama)


@pytest.mark.parametrize(
    ("fields", "probes"),
    [
        ({"architectures": ["DiffusionLlamaForCausalLM"]}, {"config", "base-config"}),
        ({"rms_norm_eps": 1e-3}, {"base-config", "base-logits"}),
        ({"auto_map": {}}, {"config"}),
    ],
    # Both processes of a run name a set alike.
    ids=lambda value: "-".join(sorted(value)),
)
def test_a_config_that_is_not_the_bases(
    fields: dict[str, Any], probes: set[str], llama: tuple[Path, Path]
) -> None:
    edit_json(llama[0], "config.json", **fields)
    assert check(llama) == probes


@pytest.mark.parametrize("damage", ["lost", "of another rank"])
def test_an_adapter_that_does_not_load(damage: str, llama: tuple[Path, Path]) -> None:
    if damage == "lost":
        (llama[0] / ADAPTER).unlink()
    else:
        edit_tensors(
            llama[0], lambda t: t.update({n: v[:1].clone() for n, v in t.items()}), ADAPTER
        )
    assert "gated" in check(llama, "gated")


def test_every_probe_has_a_fault_that_it_catches() -> None:
    text = Path(__file__).read_text()
    assert [name for name in GATED if f'"{name}"' not in text] == []
