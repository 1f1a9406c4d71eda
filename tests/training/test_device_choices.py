"""What is chosen for a device: optimizers that need a GPU, layers that are compiled one by one."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from test_trainer import QUIET, converted
from transformers import TrainerCallback, TrainingArguments

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_model
from dllm_convert.recipe.schema import Training
from dllm_convert.training import run as training_run
from dllm_convert.training import setup
from dllm_convert.training.run import _arguments, train
from dllm_convert.training.setup import compile_layers, require_devices, settled_plan


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_in_8_bits_need_a_gpu_and_bitsandbytes(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(method="full", optimizer=optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IncompatibleError, match="needs a CUDA GPU, and there is none"):
        require_devices(training)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(setup, "is_installed", lambda name: False)
    with pytest.raises(IncompatibleError, match="needs bitsandbytes, which is not installed"):
        require_devices(training)
    monkeypatch.setattr(setup, "is_installed", lambda name: True)
    require_devices(training)


def test_an_old_torch_has_no_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "has_flex", lambda: False)
    with pytest.raises(IncompatibleError, match=r"needs torch 2\.7 or newer"):
        require_devices(Training(method="full", attention="flex"))


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        # transformers' own choice, which is no fused one before torch 2.8.
        ("adamw", TrainingArguments.default_optim),
        ("adamw_8bit", "adamw_bnb_8bit"),
        ("paged_adamw_8bit", "paged_adamw_8bit"),
    ],
)
def test_the_trainer_is_told(
    optimizer: str, name: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, _ = converted(source_cache("llama"), tmp_path / "a", method="full", optimizer=optimizer)
    arguments = _arguments(plan.recipe, tmp_path / "out/.work/trainer", False, False)
    assert arguments.optim.value == name


def test_a_run_trains_what_was_chosen_for_its_device(
    tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = converted(
        source_cache("llama"), tmp_path / "a", method="full",
        batch_size="auto", gradient_accumulation=6,
    )  # fmt: skip
    here = settled_plan(plan).recipe.training
    assert here.gradient_checkpointing == "selective"
    assert (here.batch_size, here.gradient_accumulation) == (1, 6)

    class Card:
        name, total_memory = "a card", 24 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    there = settled_plan(plan).recipe.training
    assert there.gradient_checkpointing == "off"
    assert (there.batch_size, there.gradient_accumulation) == (6, 1)
    monkeypatch.undo()
    arguments = training_run._arguments(
        plan.recipe.model_copy(update={"training": there}), tmp_path / "b/.work/t", False, False
    )
    assert arguments.per_device_train_batch_size == 6


def test_one_compilation_serves_all_layers(tmp_path: Path, source_cache: SourceFactory) -> None:
    plan, _ = converted(source_cache("llama"), tmp_path / "a", method="full")
    plain = load_model(tmp_path / "a", plan.adapter)
    compiled = load_model(tmp_path / "a", plan.adapter)
    torch._dynamo.reset()
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    compile_layers(compiled, backend=backend)
    tokens = torch.arange(6, 30)[None]
    assert torch.allclose(plain(tokens).logits, compiled(tokens).logits, atol=1e-6)
    layers = len(compiled.model.layers)
    assert layers > 1
    assert 0 < len(seen) < 2 * layers
    first = len(seen)
    compiled(tokens)
    assert len(seen) == first
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_nothing_of_a_training_stays_in_memory(
    method: str, tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a", method=method, steps=2)
    held: list[Any] = []
    plain = training_run._trainer

    def watched(*given: Any) -> Any:
        trainer = plain(*given)
        held.extend(weakref.ref(part) for part in (trainer, trainer.model))
        trainer.add_callback(Kept(held))
        return trainer

    monkeypatch.setattr(training_run, "_trainer", watched)
    # The collector runs when it likes; what is asked is whether training has it run.
    gc.disable()
    try:
        train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
        assert len(held) == 3
        assert [part() for part in held] == [None, None, None]
    finally:
        gc.enable()


class Kept(TrainerCallback):
    """Remembers the optimizer, weakly."""

    def __init__(self, held: list[Any]) -> None:
        self._held = held

    def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
        self._held.append(weakref.ref(kwargs["optimizer"]))
