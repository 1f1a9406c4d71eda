"""The mathematics of masked diffusion: noise schedules, corruption, objectives, likelihoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_convert.common.lazy import lazily

if TYPE_CHECKING:
    from dllm_convert.diffusion.corruption import Corruption as Corruption
    from dllm_convert.diffusion.corruption import ForwardProcess as ForwardProcess
    from dllm_convert.diffusion.corruption import NoiseKey as NoiseKey
    from dllm_convert.diffusion.corruption import corrupt as corrupt
    from dllm_convert.diffusion.likelihood import Likelihood as Likelihood
    from dllm_convert.diffusion.likelihood import nelbo as nelbo
    from dllm_convert.diffusion.objective import Objective as Objective
    from dllm_convert.diffusion.objective import TextBatch as TextBatch
    from dllm_convert.diffusion.prediction import Prediction as Prediction
    from dllm_convert.diffusion.prediction import predict as predict
    from dllm_convert.diffusion.schedule import Schedule as Schedule

_HOMES = {
    "Corruption": "dllm_convert.diffusion.corruption",
    "ForwardProcess": "dllm_convert.diffusion.corruption",
    "NoiseKey": "dllm_convert.diffusion.corruption",
    "corrupt": "dllm_convert.diffusion.corruption",
    "Likelihood": "dllm_convert.diffusion.likelihood",
    "nelbo": "dllm_convert.diffusion.likelihood",
    "Objective": "dllm_convert.diffusion.objective",
    "TextBatch": "dllm_convert.diffusion.objective",
    "Prediction": "dllm_convert.diffusion.prediction",
    "predict": "dllm_convert.diffusion.prediction",
    "Schedule": "dllm_convert.diffusion.schedule",
}
__all__ = [
    "Corruption",
    "ForwardProcess",
    "Likelihood",
    "NoiseKey",
    "Objective",
    "Prediction",
    "Schedule",
    "TextBatch",
    "corrupt",
    "nelbo",
    "predict",
]
__getattr__, __dir__ = lazily(__name__, _HOMES)
