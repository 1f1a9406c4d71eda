"""A noise schedule that is learnt with the model: MD4's exponents of classes of words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from test_distillation import QUIET, WAYS, prepared

from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.word_classes import WordClasses
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_model
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.exponents import STATE, ExponentLearner, read_exponents
from dllm_convert.training.resume import checkpoint_step, last_whole_checkpoint
from dllm_convert.training.run import train
from dllm_convert.weights.run import adapt


def conversion(
    source: Path, folder: Path, way: str = "full", target: str = "bd3lm", **training: Any
) -> ConversionPlan:
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "noise": {"schedule": "learned", "classes": 4, "exponent_rate": 0.05},
            "data": {"source": "pydoc", "sequence_length": 48, "max_documents": 40},
            "training": {
                "steps": 12, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
                "lr_schedule": "constant_with_warmup", "warmup_ratio": 0, **WAYS[way], **training,
            },
        }
    )  # fmt: skip
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["diffusion"]
    return found


@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_training_that_is_stopped_learns_the_same_exponents(
    way: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    outcomes = []
    plan = conversion(source_cache("llama"), tmp_path / "a", way, save_steps=3, keep_checkpoints=9)
    data = prepared(plan, tmp_path / "a")
    for name in ("whole", "resumed"):
        train(plan, data, tmp_path / "a", tmp_path / name, tmp_path / "work", QUIET)
        lines = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
        curve = [(line["loss"], line["nelbo"]) for line in lines]
        files = {f.name: f.read_bytes() for f in (tmp_path / name).rglob("*.safetensors")}
        outcomes.append((curve, files, section(tmp_path / name)))
        if name == "whole":
            for checkpoint in (tmp_path / "work/trainer").glob("checkpoint-*"):
                if checkpoint_step(checkpoint) > 6:
                    shutil.rmtree(checkpoint)
            last = last_whole_checkpoint(tmp_path / "work/trainer")
            assert last is not None
            assert (last / STATE).is_file()
    assert outcomes[0] == outcomes[1]
    learnt = outcomes[0][2]
    assert len(learnt["noise_exponents"]) == 4
    assert len(set(learnt["noise_exponents"])) == 4
    assert section(tmp_path / "a")["noise_exponents"] == [1.0]
    # The text has the classes' words about as often as each other.
    rows: Any = data.training_rows(start=0, total=24)
    counts = torch.zeros(plan.mask.rows_after)
    for row in range(24):
        ids = torch.as_tensor(rows[row]["input_ids"]).long()
        counts += torch.bincount(ids, minlength=len(counts))
    shares = [float(counts[words].sum() / counts.sum()) for words in learnt["noise_classes"]]
    assert all(0.1 < share < 0.4 for share in shares), shares
    # What is loaded is measured and decoded with them.
    model = load_model(tmp_path / "whole", plan.adapter)
    classes = Objective.from_config(model.config).classes
    assert classes == read_exponents(tmp_path / "whole", plan.mask.rows_after)
    assert classes is not None
    assert list(classes.exponents) == learnt["noise_exponents"]


def test_what_is_trained_further_keeps_its_classes(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan = conversion(source_cache("llama"), tmp_path / "a", steps=4)
    data = prepared(plan, tmp_path / "a")
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    train(plan, data, tmp_path / "b", tmp_path / "c", tmp_path / "more", QUIET)
    first, then = section(tmp_path / "b"), section(tmp_path / "c")
    assert first["noise_classes"] == then["noise_classes"]
    for one, other in zip(first["noise_exponents"], then["noise_exponents"], strict=True):
        assert one != other
        assert abs(one / other - 1) < 0.5


def test_a_checkpoint_of_other_classes_is_refused(tmp_path: Path) -> None:
    learner = ExponentLearner(WordClasses((1.0, 1.0), ((3,),), 9), 0.1)
    for text in (None, '{"steps": 3, "log": [[0.0]]}', '{"steps": 3}'):
        if text is not None:
            (tmp_path / STATE).write_text(text)
        with pytest.raises(IncompatibleError, match="has no exponents of 2 classes"):
            learner.load(tmp_path)


def test_a_common_factor_is_nobodys_to_move() -> None:
    """A gradient that pulls all of them one way, as one of a bound that is cut off, moves none."""
    learner = ExponentLearner(WordClasses((1.0, 2.0, 0.5), ((3,), (4,)), 9), 0.1)
    begun = learner.classes.exponents
    for _ in range(200):
        learner._gradient += 1.0 / torch.tensor(learner.classes.exponents, dtype=torch.float64)
        learner.on_step_end(None, None, None)  # type: ignore[arg-type]
    assert learner.classes.exponents == pytest.approx(begun)
    # What pulls one and not the others moves them apart.
    for _ in range(20):
        learner._gradient[0] += 1.0
        learner.on_step_end(None, None, None)  # type: ignore[arg-type]
    first, *others = learner.classes.exponents
    assert first < 0.8 * begun[0]
    assert all(now > then for now, then in zip(others, begun[1:], strict=True))
    assert torch.tensor(learner.classes.exponents).log().mean().abs() < 1e-6
