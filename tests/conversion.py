"""Convert a tiny checkpoint with the real stages, for tests of what comes after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from dllm_convert.adapters.base import Adapter
from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source


def convert(
    base: Path,
    folder: Path,
    target: str,
    *,
    block: int = 8,
    method: str = "none",
    light: bool = False,
    measured: Adapter | None = None,
    **fields: Any,
) -> ConversionPlan:
    """Write an untrained conversion of `base` into `folder` and return its plan.

    Args:
        base: Tiny checkpoint.
        folder: New folder.
        target: mdlm or bd3lm.
        block: Tokens per block, bd3lm only.
        method: What the recipe says of training; nothing is trained here.
        light: Whether transformers is left out.
        measured: The family, where no file declares it.
        **fields: Other fields of the recipe.
    """
    from dllm_convert.weights.run import adapt

    recipe = {
        "source": str(base),
        "target": target,
        "block_size": block if target == "bd3lm" else None,
        "data": {"sequence_length": block * 8},
        "training": {"method": method},
    }
    plan = make_plan(
        Recipe.model_validate({**recipe, **fields}), inspect_source(str(base)), measured
    )
    adapt(plan, base, folder, Reporter(quiet=True), light=light)
    return plan


def convert_leaning(base: Path, folder: Path, target: str = "bd3lm", **fields: Any) -> Path:
    """Convert a checkpoint whose hidden states lean to one side, as those of trained ones do.

    Args:
        base: Tiny checkpoint; written to.
        folder: New folder.
        target: mdlm or bd3lm.
        **fields: Fields of the recipe, blocks of 4 and no token shift beside them.
    """
    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    convert(base, folder, target, **{"block": 4, "token_shift": "drop", **fields})
    return folder


def converted_once(
    source: Callable[[str], Path], new_folder: Callable[[str], Path], cases: Mapping[str, str]
) -> Callable[[str], Path]:
    """Return a function that converts the tiny checkpoint of a family the first time it is asked.

    Args:
        source: Where a family's checkpoint is.
        new_folder: Makes a folder for a family.
        cases: Family to target.
    """
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = new_folder(family) / "out"
            convert(source(family), made[family], cases[family])
        return made[family]

    return get


def sample(folder: Path, *options: str, code: int = 0) -> Any:
    """Run `dllm-convert sample` for 12 tokens in this process; it has to end with a code."""
    result = CliRunner().invoke(app, ["sample", str(folder), "--max-new-tokens", "12", *options])
    assert result.exit_code == code, result.stderr
    return result
