"""A base that teaches behind its cache: what it teaches, losses and gradients as under a mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from kept import KEPT, instance
from moved import moved_model, trainer_of
from test_distillation import conversion, rows
from test_gated_training import texts

from dllm_convert.diffusion.cached import predict_behind_cache, read_in_turn
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.distillation import Distillation
from dllm_convert.diffusion.drafts import draft_groups
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.modeling.published.gated import adapter_parameters
from dllm_convert.training.teacher import Teacher

HOW: dict[str, dict[str, Any]] = {
    "forward": {},
    "softened": {"temperature": 2.0},
    "reverse": {"divergence": "reverse_kl", "weight": 1.0},
    "few words": {"divergence": "total_variation", "top_k": 7},
    "beside confidence": {"top_k": 5},
    "hidden states": {"weight": 0.0},
}


def step(plan: Any, folder: Path, behind: str, how: str, *, fused: bool) -> tuple[Any, ...]:
    """Loss, gradients and what is logged of one step of a model with causal drafts."""
    model = moved_model(plan, folder)
    if behind == "cache":
        model.config.diffusion["behind"] = "cache"
    trainer = trainer_of(plan, folder, model)
    if not fused:
        trainer._comparer._fused._head = None
        trainer._teacher._head = None
    batches, _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    assert batches[0]["noise"].objective.behind == behind
    loss = trainer.compute_loss(model.train(), batches[0])
    loss.backward()
    assert model.training
    gradients = {name: weight.grad for name, weight in adapter_parameters(model).items()}
    return loss.detach(), gradients, trainer.counts.take(lambda sums: sums)


@pytest.mark.parametrize("way", ["gated", "drafts"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fused", [True, False])
def test_it_is_the_loss_under_a_mask(
    way: str, how: str, fused: bool, tmp_path: Path, source_cache: SourceFactory
) -> None:
    settings: dict[str, Any] = {"attention": "sdpa", "gradient_checkpointing": "off"}
    if how == "hidden states":
        settings["alignment_loss_weight"] = 0.7
    if how == "beside confidence":
        settings["confidence_loss_weight"] = 0.2
    plan = conversion(
        source_cache("llama"), tmp_path / "c", way, more=settings, draft="causal", **HOW[how]
    )
    (masked, expected, logged), (cached, found, also) = (
        step(plan, tmp_path / "c", behind, how, fused=fused) for behind in ("mask", "cache")
    )
    torch.testing.assert_close(cached, masked, atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3)
    assert also == pytest.approx(logged, rel=1e-4)
    assert bool(also.get("cosine")) == (how == "hidden states")
    assert also["divergence"] > 0


def small_texts() -> TextBatch:
    """The texts with tokens that a vocabulary of 96 has."""
    batch = texts()
    return replace(batch, tokens=batch.tokens % 70 + 16)


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("draw", ["count", "draft"])
@pytest.mark.parametrize("family", KEPT)
def test_the_lesson_is_what_the_base_predicts(family: str, draw: str, top_k: int | None) -> None:
    """Of the stock class, document by document, at every prediction and in its order."""
    made = instance(family)
    model: Any = made.gated()
    objective, batch = Objective.from_config(model.config), small_texts()
    key = NoiseKey(0, 0, 0, 3)
    if draw == "draft":
        views = draft_groups(batch, objective, key)
    else:
        views = corrupt(batch, objective, ForwardProcess(draw="count", complementary=True), key)
    laid_out = predict_behind_cache(batch, views, objective)
    logits = torch.zeros(*batch.tokens.shape, model.config.vocab_size)
    with torch.no_grad():
        for row, segments in enumerate(batch.segments):
            for document in segments[segments >= 0].unique().tolist():
                inside = segments == document
                alone = batch.tokens[row, inside][None]
                logits[row, inside] = made.base(alone, use_cache=False).logits[0]
    expected = logits[laid_out.rows, laid_out.columns - 1]
    teacher = Teacher(model, Distillation(0.5, top_k=top_k), objective.mask_token_id)
    seen = 0
    for turn in read_in_turn(model, laid_out, objective, teacher):
        if turn.rows is None:
            continue
        lesson, own = turn.lesson, expected[turn.span]
        assert lesson is not None and len(lesson) == len(own) == len(turn.rows.at)
        if lesson.words is not None:
            own = own.gather(-1, lesson.words)
            assert lesson.words.shape[-1] == top_k
        torch.testing.assert_close(lesson.states, own, atol=2e-4, rtol=1e-3)
        seen += len(lesson)
    assert seen == len(laid_out.targets) > 20


def test_a_text_without_anything_masked_teaches_nothing() -> None:
    model: Any = instance("lfm2").gated()
    objective, batch = Objective.from_config(model.config), small_texts()
    nothing = replace(batch, loss=torch.zeros_like(batch.tokens, dtype=torch.bool))
    views = corrupt(nothing, objective, ForwardProcess(), NoiseKey(0, 0, 0, 3))
    teacher = Teacher(model, Distillation(0.5), objective.mask_token_id)
    laid_out = predict_behind_cache(nothing, views, objective)
    (turn,) = read_in_turn(model, laid_out, objective, teacher)
    assert turn.rows is None
    assert not len(turn.firsts)
