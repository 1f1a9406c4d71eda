"""Hidden states drawn to the base's: which states, which places, values and gradients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from moved import trainer_of
from test_distillation import QUIET, WAYS, prepared, rows, texts
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.diffusion.alignment import misalignment
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.planning.costs import flops_per_token, peak_memory
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.asked import weights_of
from dllm_convert.training.run import train
from dllm_convert.training.trainer import DiffusionTrainer
from dllm_convert.weights.run import adapt

WEIGHT = 3.0


def conversion(
    source: Path, folder: Path, way: str = "full", target: str = "bd3lm", **training: Any
) -> ConversionPlan:
    settings = {
        "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
        "lr_schedule": "constant_with_warmup", "warmup_ratio": 0,
        "alignment_loss_weight": WEIGHT, **WAYS[way], **training,
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "noise": {"draw": "draft"} if way == "drafts" else {"draw": "count", "views": 2},
            "data": {"source": "pydoc", "sequence_length": 32, "max_documents": 40},
            "training": settings,
        }
    )
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan


def forward(trainer: DiffusionTrainer) -> tuple[torch.Tensor, Any, dict[str, torch.Tensor]]:
    """Loss, what was laid out for it, and gradients."""
    kept: list[Any] = []
    lay_out = trainer._lay_out

    def seen(*given: Any) -> Any:
        kept.append(lay_out(*given))
        return kept[0]

    trainer._lay_out = seen  # type: ignore[method-assign]
    trainer.model.zero_grad()
    (inputs,), _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trainer._lay_out = lay_out  # type: ignore[method-assign]
    named = trainer.model.named_parameters()
    return loss.detach(), kept[0], {n: w.grad.clone() for n, w in named if w.grad is not None}


@torch.no_grad()
def base_states(source: Path) -> list[torch.Tensor]:
    """Hidden states of transformers' own class, document by document: each (3, 48, width)."""
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    batch = texts()
    found: list[torch.Tensor] = []
    for row in range(len(batch.tokens)):
        for document in batch.segments[row].unique().tolist():
            inside = batch.segments[row] == document
            if document < 0:
                continue
            states = base(batch.tokens[row, inside][None], output_hidden_states=True).hidden_states
            found = found or [torch.zeros(*batch.tokens.shape, s.shape[-1]) for s in states]
            for kept, state in zip(found, states, strict=True):
                kept[row, inside] = state[0]
    return found[1:]


@pytest.mark.parametrize(
    ("family", "way", "target"),
    [
        *(("llama", way, "bd3lm") for way in WAYS),
        *(("llama", way, "mdlm") for way in ("full", "lora")),
        *((family, "full", "bd3lm") for family in ("mistral", "qwen2", "qwen3")),
        ("qwen3", "gated", "bd3lm"),
    ],
)
def test_it_is_the_mean_cosine_at_what_is_predicted(
    family: str, way: str, target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    """Against states of the stock class and torch's autograd, with another forward of its own."""
    source = source_cache(family)
    trainer = trainer_of(conversion(source, tmp_path / "c", way, target), tmp_path / "c")
    model, base = trainer.model, base_states(source)
    loss, (laid_out, beside, lesson), gradients = forward(trainer)
    rows_at, places = laid_out.rows, laid_out.places
    assert len(lesson) == len(places) > 15 and len(lesson.layers) == len(base)
    for given, state in zip(lesson.layers, base, strict=True):
        torch.testing.assert_close(given, state[rows_at, places - 1], atol=2e-4, rtol=1e-3)

    # The same loss once more: without the states, and by autograd from the forward's own.
    weights, items = trainer._weights, laid_out.weight
    trainer._weights = weights_of(
        trainer_plan(source, way, target).training
    )  # Nothing is learnt from the base.
    trainer._teacher = None
    plain, _, others = forward(trainer)
    (inputs,), _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    model.zero_grad()
    mask = laid_out.dense_mask()
    states = model(
        **laid_out.inputs, **beside, attention_mask=mask, use_cache=False, output_hidden_states=True
    ).hidden_states
    at = laid_out.inputs["logits_at"][: len(lesson)]
    cosines = [
        torch.nn.functional.cosine_similarity(
            state.flatten(0, 1)[at].double(), given[rows_at, places - 1].double(), dim=-1
        )
        for state, given in zip(states[1:], base, strict=True)
    ]
    apart = 1 - torch.stack(cosines).mean(0)
    assert float(apart.min()) > -1e-6 and float(apart.max()) > 0.01
    term = WEIGHT * (apart * items).sum() / inputs["noise"].items
    assert float(loss) == pytest.approx(float(plain + term), rel=1e-4)
    term.backward()
    for name, weight in model.named_parameters():
        if name in gradients:
            whole = others.get(name, 0) + (0 if weight.grad is None else weight.grad)
            torch.testing.assert_close(gradients[name], whole, atol=3e-4, rtol=5e-3)
    assert weights.alignment == WEIGHT


def trainer_plan(source: Path, way: str, target: str) -> Recipe:
    return Recipe.model_validate(
        {"source": str(source), "target": target, "block_size": 8 if target == "bd3lm" else None,
         "training": WAYS[way]}
    )  # fmt: skip


@pytest.mark.parametrize("again", ["selective", "full"])
@pytest.mark.parametrize("way", ["full", "gated"])
def test_what_is_computed_again_changes_nothing(
    way: str, again: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    found = []
    for how in ("off", again):
        plan = conversion(source_cache("llama"), tmp_path / how, way, gradient_checkpointing=how)
        found.append(forward(trainer_of(plan, tmp_path / how)))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(gradient, found[1][2][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("way", ["full", "lora", "gated"])
def test_states_come_nearer_and_a_stopped_training_goes_on(
    way: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    fields = {"alignment_loss_weight": 20.0, "steps": 16, "save_steps": 6, "learning_rate": 3e-3}
    plan = conversion(source_cache("qwen2"), tmp_path / "a", way, **fields)
    data, outcomes = prepared(plan, tmp_path / "a"), []
    for name in ("whole", "resumed"):
        train(plan, data, tmp_path / "a", tmp_path / name, tmp_path / "w", QUIET)
        lines = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").open()]
        files = sorted((tmp_path / name).rglob("*.safetensors"))
        outcomes.append(([line["cosine"] for line in lines], [f.read_bytes() for f in files]))
        for step in (12, 16):
            shutil.rmtree(tmp_path / f"w/trainer/checkpoint-{step}", ignore_errors=True)
    assert outcomes[0] == outcomes[1]
    cosines, _ = outcomes[0]
    assert len(cosines) == 16 and all(-1 <= value <= 1 for value in cosines)
    assert sum(cosines[-4:]) / 4 > cosines[0] + 0.02
    assert "divergence" not in lines[0], "only states are compared"


def test_a_state_is_nearest_to_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(5, 7, generator=draw) for _ in range(3)]
    assert float(misalignment(states, [3 * state for state in states]).abs().max()) < 1e-6
    assert misalignment(states, [-state for state in states]).tolist() == pytest.approx([2.0] * 5)
    # A state of nothing has no direction, and no gradient that is no number.
    nothing = torch.zeros(5, 7, requires_grad=True)
    apart = misalignment([nothing], states[:1])
    apart.sum().backward()
    assert apart.isfinite().all() and nothing.grad is not None and nothing.grad.isfinite().all()


FIELD = "training.alignment_loss_weight"


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("bert", (), "reads both sides of every token"),
        ("llama", ("token_shift=drop",), "stands for its own token"),
        ("llama", ("training.compile=true",), "compiled layers"),
        ("llama", ("noise.kernel=uniform", "noise.discrete_steps=8", "noise.draw=time",
                   "noise.complementary=false"), "has none"),
        ("llama", ("training.method=none",), "nothing is trained"),
    ],
)  # fmt: skip
def test_where_states_cannot_be_compared_it_is_refused(
    family: str, more: tuple[str, ...], said: str, source_cache: SourceFactory
) -> None:
    sets = [part for one in (*more, f"{FIELD}=1") for part in ("--set", one)]
    result = CliRunner().invoke(app, ["check", str(source_cache(family)), "--to", "mdlm", *sets])
    assert result.exit_code in (2, 3), result.output
    assert said in " ".join(result.output.split())


def test_the_plan_counts_the_base_and_what_is_kept(source_cache: SourceFactory) -> None:
    source = inspect_source(str(source_cache("llama")))

    def of(way: str, weight: float) -> tuple[Any, Any, float]:
        training = {"alignment_loss_weight": weight, **WAYS[way]}
        recipe = Recipe.model_validate(
            {"source": "x", "target": "bd3lm", "block_size": 8, "data": {"sequence_length": 32},
             "training": training}
        )  # fmt: skip
        shape = make_plan(recipe, source).shape
        assert shape is not None
        memory = peak_memory(shape, recipe, gpu=True, bf16=True, flex=True)
        return shape, memory, flops_per_token(shape, recipe, sparse=True)

    for way in ("full", "lora", "gated"):
        (shape, without, cheap), (_, memory, dear) = of(way, 0.0), of(way, 1.0)
        assert memory.teacher == (2 * shape.parameters if way == "full" else 0)
        assert memory.activations > without.activations and dear > cheap
