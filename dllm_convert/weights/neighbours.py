"""Write which words are near to each, for noise that walks among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from dllm_convert.common.console import Reporter
from dllm_convert.common.diffusion_section import NEIGHBOURS_FILE
from dllm_convert.diffusion.neighbours import nearest
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.source.safetensors_header import read_checkpoint


def write_neighbours(plan: ConversionPlan, out: Path, reporter: Reporter) -> None:
    """Write the graph of a conversion that has its weights, by the rows of the source's embedding.

    Args:
        plan: The conversion.
        out: Its folder.
        reporter: Progress.

    Raises:
        DataError: The embedding has numbers that are not finite, or too few rows.
    """
    rows = _embeddings(plan, out)
    with reporter.task("find words that are near", total=len(rows)) as task:
        near = nearest(rows, plan.recipe.noise.neighbours or 1, plan.mask.id, task.advance)
    np.save(out / NEIGHBOURS_FILE, near, allow_pickle=False)


def _embeddings(plan: ConversionPlan, out: Path) -> torch.Tensor:
    name = plan.adapter.embedding
    for file, header in read_checkpoint(out).items():
        if name in header.entries:
            with safe_open(out / file, framework="pt") as weights:
                tensor: torch.Tensor = weights.get_tensor(name)
                return tensor
    raise RuntimeError(f"{name} was planned, and is in no file")
