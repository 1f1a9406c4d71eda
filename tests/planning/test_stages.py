"""Every stage of a run has its peak, and the largest decides what fits."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from dllm_convert.planning.costs import CPU_RUNTIME, GPU_RUNTIME
from dllm_convert.planning.devices import Device, cpu
from dllm_convert.planning.estimate import estimate_device, stages_on
from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.planning.needs_text import fits_text
from dllm_convert.planning.stages import DURING
from dllm_convert.recipe.schema import Recipe

QWEN25_7B = ModelShape(
    embedding=544_997_376,
    head=544_997_376,
    layer_parameters=6_525_618_176,
    other=3_584,
    tied=False,
    vocabulary=152_064,
    hidden=3_584,
    layers=28,
    queries=3_584,
    heads=28,
    matrices=6_525_288_448.0,
    outputs=1_405_000.0,
    stored_matrices=6_525_288_448,
    adapted=2_523_136,
    adapted_matrices=196,
    adapted_outputs=1_405_000.0,
    norms=204_288,
)
"""Qwen2.5-7B."""


def recipe(target: str = "bd3lm", **training: Any) -> Recipe:
    block = 16 if target == "bd3lm" else None
    fields = {"method": "lora", "batch_size": 1, **training}
    return Recipe.model_validate(
        {"source": "x", "target": target, "block_size": block, "training": fields}
    )


def gpu(gigabytes: float) -> Device:
    return Device("a GPU", 1e14, round(gigabytes * 1e9), gpu=True, bf16=True, source="")


QLORA = {"lora": {"quantize": "nf4", "embeddings": "mask_row"}}


def test_what_trains_in_4_bits_is_measured_in_16() -> None:
    made = recipe(**QLORA)
    stages = {stage.stage: stage for stage in stages_on(QWEN25_7B, made, gpu(18), causal=True)}
    assert tuple(stages) == DURING
    assert (stages["train"].held, stages["measure"].held) == ("nf4", "bfloat16")
    assert stages["measure"].device > GPU_RUNTIME + 2 * QWEN25_7B.parameters
    assert stages["measure"].device > stages["train"].device
    assert stages["baseline"].device >= stages["measure"].device
    assert all(stage.device < 0.95 * 18e9 for stage in stages.values())


def test_the_largest_stage_decides() -> None:
    fits, not_quite = (
        estimate_device(QWEN25_7B, recipe(**QLORA), gpu(gigabytes)) for gigabytes in (18, 16)
    )
    assert (fits.fits, not_quite.fits) == (True, False)
    assert (fits.stage, not_quite.stage) == ("views", "views")
    # Its training alone would fit.
    assert not_quite.devices_needed == 1
    assert not_quite.memory < 0.95 * 16e9 < not_quite.stage_memory
    assert fits_text(asdict(fits)) == "1 is enough"
    assert fits_text(asdict(not_quite)) == "1 train it, views takes 16.7 GB: measured on the CPU"


def test_a_training_on_several_is_measured_on_one() -> None:
    ten_times = replace(
        QWEN25_7B,
        layer_parameters=10 * QWEN25_7B.layer_parameters,
        stored_matrices=10 * QWEN25_7B.stored_matrices,
        layers=280,
    )
    found = estimate_device(ten_times, recipe(method="full"), gpu(80))
    assert found.devices_needed is not None
    assert found.devices_needed > 10
    assert not found.fits
    assert found.stage == "views"
    assert found.stage_memory > 2 * ten_times.parameters
    assert found.fits_with is None


def test_full_training_decides_itself() -> None:
    for device in (gpu(141), cpu(2, 10**12, bf16=True)):
        found = estimate_device(QWEN25_7B, recipe(method="full"), device)
        assert (found.stage, found.stage_memory) == ("train", found.memory)


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_on_a_cpu_all_is_float32_in_one_memory(target: str) -> None:
    stages = stages_on(QWEN25_7B, recipe(target), cpu(2, 10**12, bf16=True), causal=True)
    for stage in stages:
        assert stage.host == stage.device
        assert stage.held == ("" if stage.stage == "adapt" else "float32")
        if stage.stage != "adapt":
            assert stage.device > CPU_RUNTIME + 4 * QWEN25_7B.parameters


def test_an_encoder_has_no_likelihood_of_its_own() -> None:
    made = recipe("mdlm")
    with_base, without = (
        {s.stage: s.device for s in stages_on(QWEN25_7B, made, gpu(80), causal=causal)}
        for causal in (True, False)
    )
    assert without["baseline"] == without["measure"] < with_base["baseline"]
