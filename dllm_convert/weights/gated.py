"""Write the adapter of a conversion that keeps its base, before it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.modeling.gated_files import write_adapter_config, write_adapter_weights
from dllm_convert.modeling.published.gated import ADAPTER_FOLDER, PREFIX, attach_adapter, ends_in
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
    embedding, scale = plan.adapter.embedding.removesuffix(".weight"), 1.0
    norms: list[tuple[str, int]] = []
    if plan.adapter.measured is None and not section.adapter_norms:
        shapes = _adapted_files(headers, section.adapter_targets)
    else:
        shapes, norms, embedding, scale = _adapted_modules(plan.adapter, out)
    for module, (outputs, inputs) in sorted(shapes.items()):
        # Uniform, with the variance that PEFT's and torch's linear layers begin with.
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=draws)
        states[f"{PREFIX}{module}.lora_A.weight"] = down
        states[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(outputs, rank)
    states |= {f"{PREFIX}{name}.noisy_scale": torch.zeros(width) for name, width in norms}
    states[f"{PREFIX}{embedding}.mask_vector"] = scale * _mean_vector(plan, out, headers)
    folder, source = out / ADAPTER_FOLDER, plan.source
    write_adapter_weights(folder, states)
    write_adapter_config(
        folder,
        section,
        diffusion_class=plan.adapter.diffusion_class,
        base=source.repo_id or Path(source.given).name,
        revision=source.revision,
    )


def _adapted_files(
    headers: dict[str, Header], targets: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of the layers that get an adapter, by name, from their weights."""
    found = {}
    for header in headers.values():
        for name, entry in header.entries.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and ends_in(module, targets):
                outputs, inputs = entry.shape
                found[module] = outputs, inputs
    return found


def _adapted_modules(
    adapter: Adapter, folder: Path
) -> tuple[dict[str, tuple[int, int]], list[tuple[str, int]], str, float]:
    """Return the same from the class, whose names a file need not have.

    Also names and widths of norms whose weights noisy tokens have scaled, the name of its
    embedding, and what that multiplies its rows with.
    """
    cls = diffusion_class(adapter)
    config = cls.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model = cls(config)
        attach_adapter(model)
    found = {
        name: (module.lora_B.out_features, module.lora_A.in_features)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    norms = [
        (name, len(module.noisy_scale))
        for name, module in model.named_modules()
        if hasattr(module, "noisy_scale")
    ]
    embedding = model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    # A scale of its own is a number, and beside it at most a buffer, which has no value here.
    scales = [getattr(embedding, name, None) for name in ("scalar_embed_scale", "embed_scale")]
    scale = next((float(one) for one in scales if isinstance(one, int | float)), 1.0)
    return found, norms, names[id(embedding)], scale


def _mean_vector(plan: ConversionPlan, out: Path, headers: dict[str, Header]) -> torch.Tensor:
    name = plan.adapter.embedding
    for file, header in headers.items():
        if name in header.entries:
            entry = header.entries[name]
            with (out / file).open("rb", buffering=0) as handle:
                row = mean_row(handle.fileno(), header, entry, plan.mask.used_rows)
            return torch.frombuffer(bytearray(row), dtype=_DTYPES[entry.dtype]).float()
    raise RuntimeError(f"{name} was planned, and is in no file")
