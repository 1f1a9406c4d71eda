"""The diffusion class of an adapter: the written one, or one made from a measured stock class."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import UnsupportedError
from dllm_convert.modeling.published import measured, modeling


def diffusion_class(adapter: Adapter) -> Any:
    """Return the class that trains, samples and verifies a family.

    Raises:
        UnsupportedError: This transformers has no such stock class.
    """
    if adapter.measured is None:
        return getattr(modeling, adapter.diffusion_class)
    return _measured_class(adapter.diffusion_class, adapter.stock_class)


@cache
def _measured_class(name: str, stock_name: str) -> Any:
    # A record in somebody's config.json is not to name whatever transformers exports.
    known = stock_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    stock = getattr(transformers, stock_name, None) if known else None
    if stock is None:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no decoder {stock_name}",
            hint="Upgrade transformers to the version that config.json names",
        )
    doc = f"{stock_name} as a diffusion language model, measured."
    body = {"__module__": measured.__name__, "__doc__": doc}
    return type(name, (measured.MeasuredMixin, stock), body)
