"""Write the adapter of a conversion that keeps its base, before it is trained."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.modeling.gated_files import write_adapter_config, write_adapter_weights
from dllm_convert.modeling.published.gated import ADAPTER_FOLDER, PREFIX
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.source.safetensors_header import Header, read_checkpoint
from dllm_convert.weights.mean_row import mean_row

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def write_untrained_adapter(plan: ConversionPlan, out: Path) -> None:
    """Write an adapter that changes nothing yet, and a mask vector to begin with.

    As in LoRA (arXiv 2106.09685) A is drawn and B is zero. The mask vector is the mean of the rows
    of the embedding that are used: what a row would be set to.

    Args:
        plan: The conversion.
        out: Its folder, which has the base's weights already.

    Raises:
        IncompatibleError: The embedding has numbers that are not finite.
    """
    section = DiffusionSection.of(plan.config_updates["diffusion"])
    rank = section.adapter_rank or 1
    draws = torch.Generator().manual_seed(plan.recipe.training.seed)
    states: dict[str, torch.Tensor] = {}
    headers = read_checkpoint(out)
    shapes = {
        name: entry.shape for header in headers.values() for name, entry in header.entries.items()
    }
    for name in sorted(shapes):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2] not in section.adapter_targets:
            continue
        outputs, inputs = shapes[name]
        # Uniform, with the variance that PEFT's and torch's linear layers begin with.
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=draws)
        states[f"{PREFIX}{module}.lora_A.weight"] = down
        states[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(outputs, rank)
    embedding = plan.adapter.embedding
    vector = _mean_vector(plan, out, headers)
    states[f"{PREFIX}{embedding.removesuffix('.weight')}.mask_vector"] = vector
    folder, source = out / ADAPTER_FOLDER, plan.source
    write_adapter_weights(folder, states)
    write_adapter_config(
        folder,
        section,
        diffusion_class=plan.adapter.diffusion_class,
        base=source.repo_id or Path(source.given).name,
        revision=source.revision,
    )


def _mean_vector(plan: ConversionPlan, out: Path, headers: dict[str, Header]) -> torch.Tensor:
    name = plan.adapter.embedding
    for file, header in headers.items():
        if name in header.entries:
            entry = header.entries[name]
            with (out / file).open("rb", buffering=0) as handle:
                row = mean_row(handle.fileno(), header, entry, plan.mask.used_rows)
            return torch.frombuffer(bytearray(row), dtype=_DTYPES[entry.dtype]).float()
    raise RuntimeError(f"{name} was planned, and is in no file")
