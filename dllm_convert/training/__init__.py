"""Text in, trained checkpoint out: data, trainer, progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_convert.common.lazy import lazily

if TYPE_CHECKING:
    from dllm_convert.training.data.rows import collate as collate
    from dllm_convert.training.data.rows import text_batch as text_batch
    from dllm_convert.training.parts import Annealing as Annealing
    from dllm_convert.training.parts import LossWeights as LossWeights
    from dllm_convert.training.text import TrainingText as TrainingText
    from dllm_convert.training.text import prepare_data as prepare_data
    from dllm_convert.training.trainer import DiffusionTrainer as DiffusionTrainer

_HOMES = {
    "Annealing": "dllm_convert.training.parts",
    "DiffusionTrainer": "dllm_convert.training.trainer",
    "LossWeights": "dllm_convert.training.parts",
    "collate": "dllm_convert.training.data.rows",
    "text_batch": "dllm_convert.training.data.rows",
    "TrainingText": "dllm_convert.training.text",
    "prepare_data": "dllm_convert.training.text",
}
__all__ = [
    "Annealing",
    "DiffusionTrainer",
    "LossWeights",
    "TrainingText",
    "collate",
    "prepare_data",
    "text_batch",
]
__getattr__, __dir__ = lazily(__name__, _HOMES)
