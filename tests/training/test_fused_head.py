"""A model that returns its loss in place of logits learns what one with logits learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from factory import FAMILIES
from test_trainer import converted

from dllm_convert.modeling.loading import load_model
from dllm_convert.recipe.schema import Noise
from dllm_convert.training.asked import process_of, weights_of
from dllm_convert.training.data.rows import collate
from dllm_convert.training.fused_head import FusedHead
from dllm_convert.training.run import _arguments
from dllm_convert.training.setup import make_trainable
from dllm_convert.training.trainer import DiffusionTrainer

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 4, "embeddings": "full"}},
    "mask-row": {"method": "lora", "lora": {"rank": 4, "embeddings": "mask_row"}},
}


def one_step(
    plan: Any, folder: Path, rows: dict[str, torch.Tensor], *, fused: bool
) -> tuple[float, float, dict[str, torch.Tensor], list[tuple[int, ...]]]:
    """Loss, its part of the bound, gradients, and the shapes of what the model returned."""
    recipe = plan.recipe
    torch.manual_seed(0)
    model = load_model(folder, plan.adapter)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_hook(lambda m, i, output: shapes.append(tuple(output.logits.shape)))
    model = make_trainable(model, plan.adapter, recipe.training)
    trainer = DiffusionTrainer(
        model,
        _arguments(recipe, folder / ".work/trainer", False, False),
        process=process_of(recipe.noise),
        weights=weights_of(recipe.training),
    )
    if not fused:
        trainer._comparer._fused._head = None
    trainer.current_gradient_accumulation_steps = 1
    batches, _ = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    loss = trainer.training_step(trainer.accelerator.prepare_model(model), batches[0])
    named = [(name, w.grad) for name, w in model.named_parameters() if w.requires_grad]
    found = {name: torch.zeros(()) if grad is None else grad for name, grad in named}
    return float(loss), float(trainer.counts._sums[0]), found, shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_losses_and_gradients_are_those_of_logits(
    family: str, method: str, tied: bool, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = converted(source_cache(family, tied=tied), tmp_path / "a", **METHODS[method])
    text = data.training_rows(start=0, total=4)
    rows = collate([text[number] for number in range(4)])
    plain = one_step(plan, tmp_path / "a", rows, fused=False)
    fused = one_step(plan, tmp_path / "a", rows, fused=True)
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    assert fused[1] == pytest.approx(plain[1], rel=1e-5)
    assert set(fused[2]) == set(plain[2])
    for name, gradient in plain[2].items():
        assert torch.allclose(fused[2][name], gradient, atol=1e-5), name
    assert len(plain[3][0]) == 2
    if method != "full":
        # Before the first step an adapter adds nothing: the head with its biases is the base's own.
        model = load_model(tmp_path / "a", plan.adapter)
        tokens = {"input_ids": rows["input_ids"][:1, :12]}
        alone = model(**tokens).logits
        adapted = make_trainable(model, plan.adapter, plan.recipe.training).eval()(**tokens).logits
        assert torch.allclose(alone, adapted, atol=1e-5)
    assert fused[3] == [(1,)]


def test_both_losses_of_a_causal_context_go_through_the_head(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = converted(
        source_cache("llama"), tmp_path / "a",
        method="full", ar_loss_weight=0.5, loss_weight="uniform",
    )  # fmt: skip
    recipe = plan.recipe.model_copy(update={"context": "causal", "noise": Noise(views=2)})
    plan = plan.__class__(**{**vars(plan), "recipe": recipe})
    text = data.training_rows(start=0, total=4)
    rows = collate([text[number] for number in range(4)])
    plain = one_step(plan, tmp_path / "a", rows, fused=False)
    fused = one_step(plan, tmp_path / "a", rows, fused=True)
    assert fused[:2] == pytest.approx(plain[:2], rel=1e-5)
    for name, gradient in plain[2].items():
        assert torch.allclose(fused[2][name], gradient, atol=1e-5), name


def test_what_does_more_than_project_keeps_its_logits(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, _ = converted(source_cache("llama", tied=False), tmp_path / "a", method="full")
    model = load_model(tmp_path / "a", plan.adapter)
    assert FusedHead(model, 5).works
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    assert not FusedHead(model, 5).works
