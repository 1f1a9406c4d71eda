"""Host memory of several processes beside their GPUs: the whole model each, or none of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import SourceFactory

from dllm_convert.planning.conversion import make_plan
from dllm_convert.planning.costs import CPU_RUNTIME
from dllm_convert.planning.document import STRATEGIES, plan_document
from dllm_convert.planning.host_memory import HostMemory, host_memory
from dllm_convert.planning.launch import Launch
from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.planning.plan_text import _host
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source

LLAMA_70B = ModelShape(
    **{"embedding": 1_050_673_152, "head": 1_050_673_152, "layer_parameters": 68_452_352_000},
    **{"other": 8_192, "tied": False, "vocabulary": 128_256, "hidden": 8_192, "layers": 80},
    **{"queries": 8_192, "heads": 64, "matrices": 68_451_041_280.0, "outputs": 6_717_440.0},
    **{"stored_matrices": 68_451_041_280, "adapted": 13_762_560, "adapted_matrices": 560},
    **{"adapted_outputs": 7_372_800.0, "norms": 1_318_912},
)
WHOLE = 4 * LLAMA_70B.parameters


def recipe(**training: Any) -> Recipe:
    fields = {"source": "x", "target": "mdlm", "training": {"method": "full", **training}}
    return Recipe.model_validate(fields)


def memory(strategy: Any, asked: Recipe | None = None, **how: Any) -> HostMemory:
    how = {"processes": 8, "per_machine": 8, **how}
    return host_memory(LLAMA_70B, asked or recipe(), strategy=strategy, **how)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "zero"])
def test_whoever_loads_the_whole_model_takes_it_once_per_process(strategy: str) -> None:
    found = memory(strategy)
    assert found.loading == CPU_RUNTIME + WHOLE
    assert found.machine == pytest.approx(8 * found.loading, rel=0.01)
    assert found.machine > 2e12


def test_under_fsdp2_no_process_does() -> None:
    found = memory("fsdp2")
    assert found.process < 6e9
    assert found.machine < 10e9
    # The first one writes a tensor at a time.
    assert found.writing - CPU_RUNTIME == pytest.approx(4 * 1_050_673_152, rel=0.1)
    assert memory("fsdp2", processes=64).process <= found.process


def test_lora_is_merged_a_matrix_at_a_time() -> None:
    lora = recipe(method="lora", lora={"rank": 64, "embeddings": "mask_row"})
    found, whole = memory("fsdp2", lora), memory("zero", lora)
    assert found.writing < 13e9 < whole.writing
    assert found.machine < 45e9
    four_bits = recipe(method="lora", lora={"rank": 64, "quantize": "nf4"})
    # What is held in 4 bits is loaded whole, and so is what its adapter is merged into.
    assert memory("fsdp2", four_bits).loading > 2 * LLAMA_70B.parameters


def test_experts_are_put_together_by_each() -> None:
    asked = {"processes": 8, "per_machine": 8, "strategy": "fsdp2"}
    experts = replace(LLAMA_70B, matrices=LLAMA_70B.matrices / 4)
    found = host_memory(experts, recipe(), **asked)
    assert found.loading == CPU_RUNTIME + WHOLE
    assert found.writing > 2 * WHOLE


def test_what_is_offloaded_and_who_teaches_is_counted() -> None:
    plain = memory("fsdp2")
    offloaded = memory("fsdp2", offload=("weights", "moments"))
    assert offloaded.training - plain.training == 16 * LLAMA_70B.parameters // 8
    for field in ({"distillation": {"weight": 0.5}}, {"alignment_loss_weight": 0.1}):
        taught = memory("fsdp2", recipe(**field))
        assert taught.loading - plain.loading == 2 * LLAMA_70B.parameters
    zero = memory("zero", offload=("moments",)).training - memory("zero").training
    assert zero == 16 * LLAMA_70B.parameters // 8  # moments, gradients and the stepped copy
    paged = memory("ddp", recipe(optimizer="paged_adamw_8bit"))
    assert paged.training - memory("ddp").training == 2 * LLAMA_70B.parameters


def test_a_machine_holds_its_own_processes() -> None:
    two = memory("ddp", processes=16)
    assert two.machine == memory("ddp").machine
    assert memory("ddp", per_machine=4).machine == pytest.approx(two.machine / 2, rel=0.01)


def test_a_plan_says_both() -> None:
    launch = {"host_memory": {name: memory(name).as_dict() for name in STRATEGIES}}
    assert _host(launch) == [
        "- host memory beside GPUs under DDP: at most 283 GB of a process, 2.26 TB a machine",
        "- host memory beside GPUs under FSDP2: at most 4.83 GB of a process, 9.2 GB a machine",
    ]
    assert _host({}) == []


def test_a_plan_says_its_own_strategy_first(source_cache: SourceFactory) -> None:
    asked = {"source": str(source_cache("llama")), "target": "mdlm"}
    plan = make_plan(
        Recipe.model_validate(asked),
        inspect_source(asked["source"]),
        launch=Launch(8, strategy="zero", stage=3, offload=("moments",)),
    )
    launch = plan_document(plan)["launch"]
    found = launch["host_memory"]
    assert list(found) == ["zero", "ddp", "fsdp2"]
    assert found["zero"]["training"] > found["ddp"]["training"]
    assert _host(launch)[0].startswith("- host memory beside GPUs under ZeRO-3: at most ")
