"""Turn pretrained Transformer checkpoints into diffusion language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_convert.common.lazy import lazily
from dllm_convert.common.version import __version__

if TYPE_CHECKING:
    from dllm_convert import diffusion as diffusion
    from dllm_convert import training as training
    from dllm_convert.common.console import Reporter as Reporter
    from dllm_convert.errors import DataError as DataError
    from dllm_convert.errors import DllmConvertError as DllmConvertError
    from dllm_convert.errors import HubError as HubError
    from dllm_convert.errors import IncompatibleError as IncompatibleError
    from dllm_convert.errors import RequestError as RequestError
    from dllm_convert.errors import TypedFieldError as TypedFieldError
    from dllm_convert.errors import UnknownSourceError as UnknownSourceError
    from dllm_convert.errors import UnknownTaskError as UnknownTaskError
    from dllm_convert.errors import UnsupportedError as UnsupportedError
    from dllm_convert.errors import VerificationError as VerificationError
    from dllm_convert.pipeline.api.conversion import Conversion as Conversion
    from dllm_convert.pipeline.api.conversion import convert as convert
    from dllm_convert.pipeline.api.conversion import load_recipe as load_recipe
    from dllm_convert.pipeline.api.conversion import plan as plan
    from dllm_convert.pipeline.api.conversion import probe as probe
    from dllm_convert.pipeline.api.endpoint import serve as serve
    from dllm_convert.pipeline.api.judging import evaluate as evaluate
    from dllm_convert.pipeline.api.judging import verify as verify
    from dllm_convert.pipeline.api.publication import export as export
    from dllm_convert.pipeline.api.publication import push as push
    from dllm_convert.pipeline.api.publication import write_card as write_card
    from dllm_convert.pipeline.api.writing import load as load
    from dllm_convert.pipeline.api.writing import reply as reply
    from dllm_convert.pipeline.api.writing import sample as sample
    from dllm_convert.planning.conversion import ConversionPlan as ConversionPlan
    from dllm_convert.recipe.schema import Recipe as Recipe
    from dllm_convert.sampling.conversation import Chat as Chat
    from dllm_convert.verification.report import VerificationReport as VerificationReport

_HOMES = {
    "Conversion": "dllm_convert.pipeline.api.conversion",
    "write_card": "dllm_convert.pipeline.api.publication",
    "convert": "dllm_convert.pipeline.api.conversion",
    "evaluate": "dllm_convert.pipeline.api.judging",
    "export": "dllm_convert.pipeline.api.publication",
    "load": "dllm_convert.pipeline.api.writing",
    "load_recipe": "dllm_convert.pipeline.api.conversion",
    "plan": "dllm_convert.pipeline.api.conversion",
    "probe": "dllm_convert.pipeline.api.conversion",
    "push": "dllm_convert.pipeline.api.publication",
    "reply": "dllm_convert.pipeline.api.writing",
    "sample": "dllm_convert.pipeline.api.writing",
    "serve": "dllm_convert.pipeline.api.endpoint",
    "verify": "dllm_convert.pipeline.api.judging",
    "Chat": "dllm_convert.sampling.conversation",
    "Recipe": "dllm_convert.recipe.schema",
    "ConversionPlan": "dllm_convert.planning.conversion",
    "VerificationReport": "dllm_convert.verification.report",
    "Reporter": "dllm_convert.common.console",
    "DllmConvertError": "dllm_convert.errors",
    "UnsupportedError": "dllm_convert.errors",
    "IncompatibleError": "dllm_convert.errors",
    "VerificationError": "dllm_convert.errors",
    "DataError": "dllm_convert.errors",
    "TypedFieldError": "dllm_convert.errors",
    "UnknownSourceError": "dllm_convert.errors",
    "UnknownTaskError": "dllm_convert.errors",
    "HubError": "dllm_convert.errors",
    "RequestError": "dllm_convert.errors",
    "diffusion": "",
    "training": "",
}
__all__ = [
    "Chat",
    "Conversion",
    "ConversionPlan",
    "DataError",
    "DllmConvertError",
    "HubError",
    "IncompatibleError",
    "Recipe",
    "Reporter",
    "RequestError",
    "TypedFieldError",
    "UnknownSourceError",
    "UnknownTaskError",
    "UnsupportedError",
    "VerificationError",
    "VerificationReport",
    "__version__",
    "convert",
    "diffusion",
    "evaluate",
    "export",
    "load",
    "load_recipe",
    "plan",
    "probe",
    "push",
    "reply",
    "sample",
    "serve",
    "training",
    "verify",
    "write_card",
]
__getattr__, __dir__ = lazily(__name__, _HOMES)
