"""Confidence-aware training through the Trainer: surer where it is right, in every way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from moved import moved_model, trainer_of
from test_distillation import QUIET, WAYS, prepared, rows
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.run import train
from dllm_convert.weights.run import adapt


def conversion(
    source: Path, folder: Path, way: str, weight: float, steps: int = 40, **training: Any
) -> ConversionPlan:
    draft = way == "drafts"
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": "bd3lm",
            "block_size": 8,
            "noise": {"draw": "draft"} if draft else {"draw": "count"},
            "data": {"source": "pydoc", "sequence_length": 32, "max_documents": 3,
                     "held_out_fraction": 0.4},
            "training": {
                "steps": steps, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32",
                "lr_schedule": "constant_with_warmup", "warmup_ratio": 0,
                "confidence_loss_weight": weight, "log_steps": 1, **WAYS[way], **training,
            },
        }
    )  # fmt: skip
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan


def losses(plan: ConversionPlan, folder: Path, *, fused: bool) -> tuple[float, Any]:
    """Loss and gradients of one forward, of a model that often says word 5 and a text that does."""
    model = moved_model(plan, folder)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and len(weight) == model.config.vocab_size:
                weight[5] *= 16
    text = rows()
    text["input_ids"][:, ::2] = 5
    trainer = trainer_of(plan, folder, model)
    if not fused:
        trainer._comparer._fused._head = None
    (inputs,), _ = trainer.get_batch_samples(iter([text]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beside", ["alone", "ar-loss", "taught"])
def test_the_fused_head_and_logits_agree(
    way: str, beside: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    more: dict[str, Any] = {
        "alone": {},
        "ar-loss": {"ar_loss_weight": 0.5},
        "taught": {"distillation": {"weight": 0.5}},
    }[beside]
    if beside == "ar-loss" and way in ("gated", "drafts"):
        pytest.skip("a kept base has no such loss")
    source = source_cache("llama")
    plan = conversion(source, tmp_path / "c", way, 2.0, **more)
    without = conversion(source, tmp_path / "w", way, 0.0, **more)
    (one, gradients), (other, others) = (losses(plan, tmp_path / "c", fused=f) for f in (1, 0))
    assert one == pytest.approx(other, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-4, rtol=1e-3)
    # It adds to the loss: some token is right even of a random model, or nothing was tested.
    plain, _ = losses(without, tmp_path / "w", fused=True)
    assert one > plain + 1e-4


def curve(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def test_what_is_right_becomes_surer(tmp_path: Path, source_cache: SourceFactory) -> None:
    """On a text that is learnt by heart, the same training with and without."""
    outcomes = []
    for weight in (1e-9, 3.0):
        folder = tmp_path / str(weight)
        plan = conversion(source_cache("llama"), folder / "a", "full", weight, steps=60)
        data = prepared(plan, folder / "a")
        train(plan, data, folder / "a", folder / "b", folder / "w", QUIET)
        lines = [line for line in curve(folder / "w") if "entropy" in line]
        assert len(lines) > 50
        outcomes.append(sum(line["entropy"] for line in lines[-10:]) / 10)
    assert outcomes[1] < 0.7 * outcomes[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("noise.kernel=uniform", "noise.discrete_steps=8", "noise.draw=time",
          "noise.complementary=false"), "masks none"),
        (("training.method=none",), "nothing is trained"),
    ],
)  # fmt: skip
def test_where_nothing_is_masked_it_is_refused(
    more: tuple[str, ...], said: str, source_cache: SourceFactory
) -> None:
    sets = [p for one in (*more, "training.confidence_loss_weight=1") for p in ("--set", one)]
    result = CliRunner().invoke(
        app, ["check", str(source_cache("llama")), "--to", "bd3lm", "--block", "8", *sets]
    )
    assert result.exit_code in (2, 3) and said in " ".join(result.stderr.split())
