"""The Trainer without a recipe: a model, arguments, an objective, rows of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from conversion import convert
from transformers import TrainerCallback, TrainingArguments

from dllm_convert.adapters import get_adapter
from dllm_convert.diffusion.corruption import ForwardProcess
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.modeling.loading import load_model
from dllm_convert.training.data.rows import text_batch
from dllm_convert.training.parts import LossWeights
from dllm_convert.training.trainer import DiffusionTrainer


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.nelbo: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "nelbo" in (logs or {}):
            self.nelbo.append(logs["nelbo"])


@pytest.mark.parametrize(("family", "target"), [("llama", "bd3lm"), ("bert", "mdlm")])
def test_a_datasets_dataset_and_a_callback_go_in(
    family: str, target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    from datasets import Dataset

    convert(source_cache(family), tmp_path / "made", target)
    model = load_model(tmp_path / "made", get_adapter(family))
    rows = [[5 + (i * j) % 7 for j in range(32)] for i in range(1, 9)]
    seen = Seen()
    trainer = DiffusionTrainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path / "work"), max_steps=6, per_device_train_batch_size=4,
            learning_rate=1e-2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=False,
        ),
        process=ForwardProcess(Schedule("cosine", min_time=1e-3), draw="count"),
        weights=LossWeights("uniform"),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        callbacks=[seen],
    )  # fmt: skip
    trainer.train()
    assert len(seen.nelbo) == 6
    assert seen.nelbo[-1] < seen.nelbo[0]


def test_the_objective_is_that_of_the_config_unless_given(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    convert(source_cache("llama"), tmp_path / "made", "bd3lm")
    model = load_model(tmp_path / "made", get_adapter("llama"))
    arguments = TrainingArguments(output_dir=str(tmp_path / "work"), use_cpu=True, report_to=[])
    assert DiffusionTrainer(model, arguments)._objective == Objective.from_config(model.config)
    other = Objective("mdlm", model.config.diffusion["mask_token_id"], token_shift=True)
    assert DiffusionTrainer(model, arguments, objective=other)._objective is other


def test_rows_without_documents_are_one_document_each() -> None:
    tokens = torch.tensor([[7, 8, 9, 0], [0, 0, 7, 8]])
    seen = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    batch = text_batch({"input_ids": tokens, "attention_mask": seen})
    assert batch.segments.tolist() == [[0, 0, 0, -1], [-1, -1, 0, 0]]
    assert batch.scorable.tolist() == [[False, True, True, False], [False, False, False, True]]
    whole = text_batch({"input_ids": tokens})
    assert whole.positions.tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="position_ids"):
        text_batch({"input_ids": tokens, "segment_ids": tokens})
