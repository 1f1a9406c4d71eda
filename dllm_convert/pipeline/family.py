"""Which adapter a source is converted with: the one a file declares, or one that is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.adapters import Adapter, get_adapter, has_adapter
from dllm_convert.adapters.measured import adapter_as_dict, adapter_from_dict
from dllm_convert.common.json_files import write_json
from dllm_convert.common.work_folder import WORK
from dllm_convert.errors import UnsupportedError
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.config_numbers import check_numbers
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.quantised import check_quantised
from dllm_convert.source.text_model import text_names

if TYPE_CHECKING:
    from dllm_convert.probing import ProbeReport

RECORD_FILE = "adapter.json"
"""File of the work folder that remembers a measured adapter: a resumed run measures no more."""


def probe_source(source: SourceInfo) -> ProbeReport:
    """Measure the family of a source; see `dllm_convert.probing`.

    Raises:
        UnsupportedError: The source does not say enough to be measured.
        IncompatibleError: Its weights are quantised, or a number of its config is none.
    """
    from dllm_convert.probing import probe_family

    if source.kind == "gguf" or not source.tensors:
        what = "a GGUF file" if source.kind == "gguf" else "a pickle"
        raise UnsupportedError(
            f"model_type {source.model_type!r} has no adapter, and {what} does not say enough to "
            "measure it",
            hint="Take the safetensors of this model",
        )
    check_quantised(source)
    check_numbers(source.config, None, len(source.tensors))
    tensors = source.tensors
    if source.inside is not None:
        tensors = {new: tensors[old] for old, new in text_names(tensors).items()}
    return probe_family(source.config, tensors)


def probe_recipe(recipe: Recipe) -> ProbeReport:
    """Measure the family of a recipe's source, whether it has an adapter or not.

    Raises:
        DllmConvertError: The source cannot be read, or does not say enough to be measured.
    """
    return probe_source(inspect_source(recipe.source, revision=recipe.revision))


def measured_adapter(recipe: Recipe, source: SourceInfo, out: Path | None = None) -> Adapter | None:
    """Return the measured adapter of a family that no file declares, None if one does.

    Args:
        recipe: Whether measuring is allowed.
        source: The checkpoint.
        out: Output folder, whose record of an earlier call is taken.

    Raises:
        UnsupportedError: Measuring is not allowed, or the family cannot be converted.
    """
    if has_adapter(source.model_type):
        return None
    if not recipe.allow_generic:
        get_adapter(source.model_type)
    recorded = None if out is None else _recorded(out, source.model_type)
    return recorded or probe_source(source).require()


def record_adapter(work: Path, adapter: Adapter) -> None:
    """Remember a measured adapter in a run's work folder."""
    if adapter.measured is not None:
        write_json(work / RECORD_FILE, adapter_as_dict(adapter))


def _recorded(out: Path, model_type: str) -> Adapter | None:
    path = out / WORK / RECORD_FILE
    if not path.is_file():
        return None
    record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    adapter = adapter_from_dict(record)
    return adapter if adapter.model_type == model_type else None
