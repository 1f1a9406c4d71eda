"""D3PM's auxiliary loss: the bound plus lambda times the cross-entropy of the clean token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from test_distillation import QUIET, WAYS, prepared, rows

from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.asked import process_of, weights_of
from dllm_convert.training.run import _arguments, train
from dllm_convert.training.setup import teaching_copy, trainable_model
from dllm_convert.training.trainer import DiffusionTrainer
from dllm_convert.weights.run import adapt

NOISES: dict[str, dict[str, Any]] = {
    "time": {},
    "discrete": {"discrete_steps": 16},
    "count": {"draw": "count", "complementary": True},
    "uniform": {"kernel": "uniform", "discrete_steps": 8},
    "uniform-views": {"kernel": "uniform", "discrete_steps": 8, "views": 2},
}
LAMBDA = 0.25


def conversion(
    source: Path, folder: Path, noise: str, way: str, target: str, weight: float, **training: Any
) -> ConversionPlan:
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "noise": NOISES[noise],
            "data": {"source": "pydoc", "sequence_length": 32, "max_documents": 40},
            "training": {
                "steps": 12, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
                "lr_schedule": "constant_with_warmup", "warmup_ratio": 0,
                "auxiliary_loss_weight": weight, **WAYS[way], **training,
            },
        }
    )  # fmt: skip
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan


def forward(plan: ConversionPlan, folder: Path) -> tuple[torch.Tensor, Any, Any, DiffusionTrainer]:
    """Loss, gradients, and the forward that was trained."""
    torch.manual_seed(0)
    model = trainable_model(plan, folder)
    trainer = DiffusionTrainer(
        model,
        _arguments(plan.recipe, folder / ".work/trainer", False, False),
        base=teaching_copy(plan, folder),
        process=process_of(plan.recipe.noise),
        weights=weights_of(plan.recipe.training),
    )
    trainer.current_gradient_accumulation_steps = 1
    (inputs,), _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, inputs["noise"], trainer


@pytest.mark.parametrize(
    ("noise", "way", "target"),
    [
        *((noise, "full", target) for noise in NOISES for target in ("bd3lm", "mdlm")),
        ("count", "gated", "bd3lm"), ("time", "lora", "mdlm"), ("uniform", "lora", "bd3lm"),
    ],
)  # fmt: skip
def test_it_adds_the_cross_entropy_of_what_was_corrupted(
    noise: str, way: str, target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    """Value and gradients, by autograd over torch's own cross-entropy, in float64."""
    source = source_cache("llama")
    plain = conversion(source, tmp_path / "p", noise, way, target, 0.0)
    both = conversion(source, tmp_path / "b", noise, way, target, LAMBDA)
    bound, gradients, _, _ = forward(plain, tmp_path / "p")
    loss, found, drawn, trainer = forward(both, tmp_path / "b")
    laid_out, beside, _ = trainer._lay_out(trainer.model, drawn)
    logits = trainer.model(
        **laid_out.inputs, **beside, attention_mask=laid_out.dense_mask(), use_cache=False
    ).logits[: len(laid_out.targets)].double()  # fmt: skip
    mask = trainer._objective.mask_token_id
    logits = torch.cat([logits[:, :mask], torch.full_like(logits[:, :1], -torch.inf),
                        logits[:, mask + 1 :]], 1)  # fmt: skip
    nats = torch.nn.functional.cross_entropy(logits, laid_out.targets, reduction="none")
    # A mean over all tokens that could have been corrupted, as the bound is: of masks, those that
    # are none have nothing to say.
    term = LAMBDA * nats.sum() / drawn.items
    assert float(term) > 0.01
    assert float(loss) == pytest.approx(float(bound + term.detach()), rel=1e-5)
    term.backward()
    for name, weight in trainer.model.named_parameters():
        if name in found:
            more = 0 if weight.grad is None else weight.grad
            torch.testing.assert_close(found[name], gradients[name] + more, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("noise", ["time", "uniform"])
def test_the_bound_that_is_logged_is_the_bound(
    noise: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    first = []
    for weight in (0.0, LAMBDA):
        folder = tmp_path / str(weight)
        plan = conversion(source_cache("llama"), folder / "a", noise, "full", "mdlm", weight)
        data = prepared(plan, folder / "a")
        train(plan, data, folder / "a", folder / "b", folder / "w", QUIET)
        line = json.loads((folder / "w/metrics.jsonl").open().readline())
        first.append((line["nelbo"], line["loss"]))
    assert first[0][0] == pytest.approx(first[1][0], rel=1e-6)
    assert first[0][0] == pytest.approx(first[0][1], rel=1e-6) and first[1][1] > first[1][0] + 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training.loss_weight": "uniform"}, "weighs the same already"),
        ({"training.method": "none"}, "nothing is trained"),
        ({"target": "bd3lm", "block_size": 4, "noise.draw": "draft", "training.method": "lora",
          "data.sequence_length": 32, "training.lora.acts_on": "noisy"}, "on no bound"),
    ],
)  # fmt: skip
def test_where_there_is_no_bound_it_is_refused(fields: dict[str, Any], message: str) -> None:
    known = {"target": "mdlm", "training.auxiliary_loss_weight": 0.1}
    with pytest.raises(IncompatibleError) as caught:
        load_recipe("x/y", overrides=known | fields)
    assert message in str(caught.value)
