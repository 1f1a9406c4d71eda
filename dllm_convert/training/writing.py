"""Write trained weights beside the files of the untrained conversion, all or nothing."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dllm_convert.common.disk import link, sync_tree
from dllm_convert.errors import DllmConvertError
from dllm_convert.modeling.gated_files import write_adapter_weights
from dllm_convert.modeling.loading import load_model
from dllm_convert.modeling.published.gated import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    PREFIX,
    adapter_parameters,
    is_adapter,
)
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.source.safetensors_header import read_checkpoint
from dllm_convert.training.adapter_files import ADAPTER, save_adapter
from dllm_convert.training.distributed import gathered_weights, is_sharded, part
from dllm_convert.training.setup import is_quantized, make_trainable, training_dtype, transplant

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def write_result(trainer: Any, untrained: Path, out: Path, plan: ConversionPlan) -> None:
    """Gather what was trained, leave the other processes, and write it in the first one.

    Args:
        trainer: A Trainer that has trained; every process calls this.
        untrained: The conversion before training.
        out: Folder to write; replaced if it exists.
        plan: The conversion.
    """
    weights = gathered_weights(trainer) if is_sharded(trainer) else None
    main, model = trainer.args.process_index == 0, trainer.model
    # transformers talks to the others while it loads and saves, and they are done.
    part()
    if not main:
        return
    training = plan.recipe.training
    if training.keeps_base:
        write_gated(adapter_parameters(model) if weights is None else weights, untrained, out)
        return
    if weights is not None or is_quantized(training):
        whole = load_model(untrained, plan.adapter, dtype=training_dtype(training))
        whole = make_trainable(whole, plan.adapter, training)
        if weights is None:
            whole = transplant(model, whole)
        else:
            whole.load_state_dict(weights)
        model = whole
    write_trained(model, untrained, out, plan)


def write_gated(weights: Mapping[str, torch.Tensor], untrained: Path, out: Path) -> None:
    """Write a trained adapter beside the base, whose files are linked, not written.

    Args:
        weights: At least the adapter's, by their names in the model.
        untrained: The conversion before training.
        out: Folder to write; replaced if it exists.
    """
    partial = out.with_name(out.name + ".partial")
    for leftover in (partial, out):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(untrained, partial, copy_function=link)
    folder = partial / ADAPTER_FOLDER
    (folder / ADAPTER_WEIGHTS).unlink()
    states = {PREFIX + name: weight for name, weight in weights.items() if is_adapter(name)}
    write_adapter_weights(folder, states)
    sync_tree(partial)
    partial.rename(out)


def write_trained(model: Any, untrained: Path, out: Path, plan: ConversionPlan) -> None:
    """Write trained weights beside the untouched files of the untrained conversion."""
    recipe, final = plan.recipe, out
    out = final.with_name(final.name + ".partial")
    for leftover in (out, final):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(untrained, out, ignore=shutil.ignore_patterns(*WEIGHT_PATTERNS))
    if recipe.training.method == "lora":
        if recipe.training.keep_adapter:
            save_adapter(model, out / ADAPTER, plan)
        tied = model.config.tie_word_embeddings
        model = model.merge_and_unload()
        if model.config.tie_word_embeddings != tied:
            raise DllmConvertError(
                "merging the adapter left the head apart from the embeddings it is tied to",
                hint="Use --full, or --set training.lora.embeddings=mask_row",
            )
    weights = out / "weights"
    stored = _stored_dtype(untrained)
    model.to(stored).save_pretrained(weights)
    for pattern in WEIGHT_PATTERNS:
        for file in weights.glob(pattern):
            file.rename(out / file.name)
    shutil.rmtree(weights)
    sync_tree(out)
    out.rename(final)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type most weights of a checkpoint are stored in."""
    sizes: Counter[str] = Counter()
    for header in read_checkpoint(folder).values():
        for entry in header.entries.values():
            sizes[entry.dtype] += entry.end - entry.start
    return _TORCH_DTYPES.get(sizes.most_common(1)[0][0], torch.float32)
