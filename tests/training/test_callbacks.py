"""What a training writes down and shows, and that a NaN is never saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from test_trainer import converted, weights
from transformers import AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DllmConvertError
from dllm_convert.pipeline.run import run
from dllm_convert.planning.costs import flops_per_token
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training import reporting
from dllm_convert.training.data.text import prepare_data
from dllm_convert.training.metrics import Metrics
from dllm_convert.training.resume import whole_checkpoints
from dllm_convert.training.run import TrainResult, train
from dllm_convert.training.trainer import DiffusionTrainer

QUIET = Reporter(quiet=True)


def trained(source: Path, folder: Path, **settings: Any) -> TrainResult:
    folder.mkdir(exist_ok=True)
    plan, data = converted(source, folder / "a", **settings)
    return train(plan, data, folder / "a", folder / "b", folder / "work", QUIET)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "work/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_says_what_a_person_asks_for(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = converted(source_cache("llama"), tmp_path / "a", gradient_accumulation=2)
    result = train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    found = lines(tmp_path)
    assert set(found[0]) == {
        "step", "seconds", "tokens", "tokens_per_second", "loss", "nelbo", "learning_rate",
        "grad_norm", "memory_gib",
    }  # fmt: skip
    assert [line["tokens"] for line in found] == [32 * 2 * 2 * step for step in range(1, 7)]
    assert result.tokens == 6 * 32 * 2 * 2
    assert [line["seconds"] for line in found] == sorted(line["seconds"] for line in found)
    assert all(0 < line["memory_gib"] < 64 for line in found)
    assert result.final_loss == found[-1]["loss"]
    assert plan.shape is not None
    assert result.flops == result.tokens * flops_per_token(plan.shape, plan.recipe, sparse=True)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("at", [3, 5, 8])
def test_what_is_not_a_number_is_never_saved(
    where: str, at: int, tmp_path: Path, source_cache: SourceFactory, monkeypatch: Any
) -> None:
    """Between two logs, right before a save, in the last step: lines come every 4 steps."""
    real = DiffusionTrainer.compute_loss

    def compute_loss(self: Any, model: Any, *arguments: Any, **keywords: Any) -> Any:
        loss = real(self, model, *arguments, **keywords)
        if self.state.global_step + 1 != at:
            return loss
        if where == "loss":
            return loss * float("nan")
        weight = next(one for one in model.parameters() if one.requires_grad)
        handle = weight.register_hook(lambda gradient: gradient * float("inf"))
        self.hooks = handle
        return loss

    monkeypatch.setattr(DiffusionTrainer, "compute_loss", compute_loss)
    settings = {"steps": 8, "log_steps": 4, "save_steps": 4}
    with pytest.raises(
        DllmConvertError, match=rf"diverged at step ({at}|{at + 1}): loss"
    ) as caught:
        trained(source_cache("llama"), tmp_path, **settings)
    kept = [path.name for path in whole_checkpoints(tmp_path / "work/trainer")]
    assert kept == (["checkpoint-4"] if at > 4 else [])
    assert ("checkpoint-4" in caught.value.message) == (at > 4)
    assert "training.learning_rate=" in str(caught.value.hint)
    assert not (tmp_path / "b").exists()
    assert all(line["step"] < at for line in lines(tmp_path))


@pytest.mark.parametrize("streaming", ["on", "off"])
@pytest.mark.parametrize("settings", [{"steps": 5000, "max_minutes": 0.005}, {"steps": 3}])
def test_what_is_trained_is_trained(
    settings: dict[str, Any], streaming: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    """Killed while the result is written, the next session trains no further."""
    plan, data = converted(source_cache("llama"), tmp_path / "a", **settings)
    chosen = plan.recipe.data.model_copy(update={"streaming": streaming})
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"data": chosen}))
    data = prepare_data(plan.recipe, AutoTokenizer.from_pretrained(tmp_path / "a"), QUIET)
    assert data.streaming == (streaming == "on")
    folders = tmp_path / "a", tmp_path / "b", tmp_path / "work"
    first = train(plan, data, *folders, QUIET)
    before = weights(tmp_path / "b", plan)
    again = train(plan, data, *folders, QUIET)
    after = weights(tmp_path / "b", plan)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert first.stopped == again.stopped == ("time" if "max_minutes" in settings else "steps")
    assert (first.steps, first.tokens) == (again.steps, again.tokens)
    assert again.seconds == pytest.approx(first.seconds, abs=1.0)
    assert again.final_loss == first.final_loss


def test_metrics_survive_a_kill_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(
        json.dumps({"step": n, "seconds": n, "tokens": 8 * n}) + "\n" for n in (1, 2, 3)
    )
    path.write_text(whole + '{"step": 4, "sec')
    assert Metrics(path, 3, writes=False).last["tokens"] == 24
    assert path.read_text().endswith("sec")
    assert Metrics(path, 2, writes=True).last["tokens"] == 16
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    path.write_bytes(b"\x00" * 40)
    assert Metrics(path, 2, writes=True).last == {}


def test_progress_in_plain_lines(
    tmp_path: Path, source_cache: SourceFactory, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("dllm_convert.common.console.PLAIN_INTERVAL_S", 0.0)
    plan, data = converted(source_cache("llama"), tmp_path / "a")
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", Reporter())
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if line.startswith("train: 4/6")]
    for part in ("loss ", "nelbo ", " tokens/s", " GiB", " left"):
        assert part in line


def small_recipe(source: Path, *report_to: str) -> Recipe:
    return Recipe.model_validate(
        {
            "source": str(source),
            "target": "mdlm",
            "data": {"sequence_length": 32, "max_documents": 40, "held_out_sequences": 4},
            "training": {"steps": 3, "batch_size": 2, "report_to": report_to},
            "generation": {"max_new_tokens": 8},
        }
    )


@pytest.mark.parametrize("name", list(reporting.DISTRIBUTIONS))
def test_a_missing_integration_is_refused_before_anything_starts(
    name: str, tmp_path: Path, source_cache: SourceFactory, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reporting, "is_installed", lambda distribution: False)
    with pytest.raises(DllmConvertError, match=f"--report-to {name} needs the package {name}"):
        run(small_recipe(source_cache("llama"), name), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_what_is_reported(tmp_path: Path, source_cache: SourceFactory, monkeypatch: Any) -> None:
    """The Trainer's own integration gets every line once, and keeps its files with the run."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    heard: list[dict[str, float]] = []
    places: list[str] = []

    class TensorBoardCallback(TrainerCallback):
        logging_dir: str | None = None

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(dict(kwargs["logs"]))
            places.append(str(self.logging_dir))

    monkeypatch.setattr(reporting, "is_installed", lambda distribution: True)
    monkeypatch.setitem(
        integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", TensorBoardCallback
    )
    recipe = small_recipe(source_cache("llama"), "tensorboard", "tensorboard")
    run(recipe, tmp_path / "out", QUIET)
    assert sum("nelbo" in logs and "loss" in logs for logs in heard) == 3
    assert set(places) == {str(tmp_path / "out/.work/tensorboard")}


def test_tensorboard_itself(tmp_path: Path, source_cache: SourceFactory) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    run(small_recipe(source_cache("llama"), "tensorboard"), tmp_path / "out", QUIET)
    events = accumulator(str(tmp_path / "out/.work/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/nelbo")] == [1, 2, 3]


def test_where_it_is_reported_does_not_make_another_run(source_cache: SourceFactory) -> None:
    source = source_cache("llama")
    plain, reported = small_recipe(source), small_recipe(source, "wandb")
    assert plain.identity() == reported.identity()
    longer = plain.model_copy(update={"training": plain.training.model_copy(update={"steps": 4})})
    assert plain.identity() != longer.identity()


def test_a_consensus_without_others_is_ones_own() -> None:
    from dllm_convert.training.consensus import Consensus

    consensus = Consensus(torch.device("cpu"))
    assert consensus.any(torch.tensor(True), False, True) == (True, False, True)
    assert consensus.any(False, False) == (False, False)
