"""Is the base that a conversion is evaluated against there, and can it be?"""

from __future__ import annotations

from pathlib import Path

from dllm_convert.adapters import adapter_of
from dllm_convert.common.hub_names import is_model_id
from dllm_convert.common.nearest import meant
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.evaluation.request import Request
from dllm_convert.modeling.converted_config import read_converted_config
from dllm_convert.source.tokenizer_loading import load_tokenizer


def check_base(request: Request) -> None:
    """Look for the base in a second, and not after hours of what the conversion is asked.

    Args:
        request: What is to be evaluated; nothing is looked for without a `base`.

    Raises:
        DataError: There is no such folder, it is a file, or its tokenizer cannot be loaded.
        IncompatibleError: The conversion's base has no likelihood of its own.
    """
    base = request.base
    if base is None:
        return
    if adapter_of(read_converted_config(request.checkpoint)).attention == "bidirectional":
        raise IncompatibleError(
            f"{base} is a masked language model, which has no likelihood of its own and "
            "writes nothing",
            hint="Leave --against out",
        )
    expected = "Give a folder with config.json beside the weights, or a Hub id"
    place = Path(base)
    if place.is_file():
        raise DataError(f"--against {base} is a file, which is not evaluated", hint=expected)
    if not place.exists() and not is_model_id(base, owned=True):
        near = meant(place)
        raise DataError(f"there is no --against {base}", hint=f"{near}{expected} (owner/name)")
    load_tokenizer(base)
