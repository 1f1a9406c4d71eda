"""Folders whose noisy tokens stand behind a cache: sound ones pass, and each fault is caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import generic
import pytest
import torch
from gated import gated_folder
from planting import failed

from dllm_convert.common.manifest import hash_files, write_manifest
from dllm_convert.diffusion import cached
from dllm_convert.modeling.published import behind
from dllm_convert.verification import GROUPS, verify_checkpoint
from dllm_convert.verification.accelerator import Accelerator
from dllm_convert.verification.catalogue import BEHIND, GATED, VERIFIED

FAMILIES = ("lfm2", "qwen3_5_text", "mistral")


@pytest.fixture(scope="module")
def cases(
    source_cache: Callable[..., Path],
    generic_source: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Path]]:
    """Return the gated folder of a family, not to be written into, and its base."""
    root, made = tmp_path_factory.mktemp("behind"), {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            measured = None
            if family == "mistral":
                # Its window stays, so nothing is laid out by a mask.
                base = source_cache(family, sliding_window=6)
            else:
                base = generic_source(family)
                measured = generic.measured(base).require()
            gated_folder(base, root / family, measured=measured)
            made[family] = root / family, base
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_folder_passes_every_probe(family: str, cases: Any, tmp_path: Path) -> None:
    folder, base = cases(family)
    folder = Path(shutil.copytree(folder, tmp_path / family))
    write_manifest(folder, {"format_version": 1, "files": hash_files(folder)})
    groups = [name for name in GROUPS if name != "portability"]
    report = verify_checkpoint(folder, against=base, untrained=False, groups=groups)
    assert [f"{p.name}: {p.measured} {p.detail}" for p in report.failed] == []
    passed = {probe.name for probe in report.probes if probe.passed}
    assert {*GATED, *BEHIND, "lossless"} <= passed
    assert {"base-config", "base-tensors", "base-logits", "batch"} <= passed
    assert {"generate", "generate-end", "generate-batch", "block-one"} <= passed
    # There is no mask of its own to look at.
    named = {probe.name for probe in report.probes}
    assert named.isdisjoint(
        {"training-mask", "attention-sdpa", "gradient", "cache", "padding-left"}
    )


THERE = Accelerator("cpu", "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_type_of_a_device_a_sound_folder_passes(family: str, dtype: str, cases: Any) -> None:
    folder, _ = cases(family)
    there = replace(THERE, dtype=dtype)
    report = verify_checkpoint(folder, groups=["device"], untrained=False, accelerator=there)
    passed = {probe.name for probe in report.probes if probe.passed}
    looked_at = {"device-logits", "device-batch", "device-generate", *VERIFIED} - {"lossless"}
    assert looked_at <= passed, report.failed
    assert "device-attention" not in {probe.name for probe in report.probes}


@pytest.mark.slow
def test_a_stranger_loads_it_with_its_code_and_without(cases: Any) -> None:
    folder, _ = cases("qwen3_5_text")
    report = verify_checkpoint(folder, groups=["portability"], untrained=False)
    passed = {probe.name for probe in report.probes if probe.passed}
    assert {"portable", "portable-stock", "portable-version"} <= passed


def found(case: tuple[Path, Path], *groups: str) -> set[str]:
    folder, base = case
    return failed(folder, groups, against=base, untrained=False)


def test_a_cache_that_is_not_the_text(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(cache: Any, rows: torch.Tensor) -> Any:
        twin = behind.branched(cache, rows)
        for layer in twin.layers:
            for states in vars(layer).values():
                for one in states.values() if isinstance(states, dict) else [states]:
                    if isinstance(one, torch.Tensor) and one.is_floating_point():
                        one.zero_()
        return twin

    case = cases("qwen3_5_text")
    monkeypatch.setattr(cached, "branched", forgetful)
    assert found(case, "behind") == {"behind-cache", "behind-training"}


def test_rows_that_write_into_the_bases_cache(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("lfm2")

    def writing(cache: Any, rows: torch.Tensor) -> Any:
        twin = behind.branched(cache, rows)
        cache.layers[1].keys.add_(1e-7)
        return twin

    monkeypatch.setattr(cached, "branched", writing)
    assert found(case, "behind") == {"behind-copy"}


def test_training_that_tells_of_no_noise(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def untold(model: Any, rows: Any, beside: Any) -> Any:
        return model(rows.tokens, logits_at=rows.at, **beside).logits

    case = cases("lfm2")
    monkeypatch.setattr(cached, "noisy_logits", untold)
    assert found(case, "behind") == {"behind-training"}


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_a_roll_back_that_forgets(family: str, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache rolled back too little, or one that cannot be and is."""
    case = cases(family)
    if family == "lfm2":
        monkeypatch.setattr("transformers.cache_utils.Cache.crop", lambda *_: None)
    else:
        monkeypatch.setattr(behind, "_rolls_back", lambda _: True)
    assert found(case, "lossless") == {"lossless"}


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_a_roll_back_that_forgets_is_seen_in_the_type_of_a_device(
    family: str, cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = cases(family)
    if family == "lfm2":
        monkeypatch.setattr("transformers.cache_utils.Cache.crop", lambda *_: None)
    else:
        monkeypatch.setattr(behind, "_rolls_back", lambda _: True)
    assert failed(folder, ["device"], accelerator=THERE, untrained=False) == {"device-lossless"}


def test_every_probe_has_a_fault_that_it_catches() -> None:
    text = Path(__file__).read_text()
    assert [name for name in BEHIND if f'"{name}"' not in text] == []
