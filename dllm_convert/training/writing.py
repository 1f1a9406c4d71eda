"""Write trained weights beside the files of the untrained conversion, all or nothing."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dllm_convert.common.disk import link, sync_tree
from dllm_convert.errors import DllmConvertError
from dllm_convert.modeling.gated_files import write_adapter_weights
from dllm_convert.modeling.hollow import hollow_model, names_of
from dllm_convert.modeling.loading import load_model
from dllm_convert.modeling.published.gated import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    PREFIX,
    is_adapter,
)
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.source.safetensors_header import read_checkpoint
from dllm_convert.training.adapter_files import ADAPTER, save_adapter
from dllm_convert.training.distributed import (
    gathered,
    gathered_adapter,
    gathered_weights,
    in_shards,
    is_sharded,
    part,
)
from dllm_convert.training.merging import MergedWeights
from dllm_convert.training.setup import is_quantized, make_trainable, training_dtype, transplant
from dllm_convert.training.shards import own_name
from dllm_convert.training.streamed import MAX_FILE, layout_of, write_weights

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def write_result(trainer: Any, untrained: Path, out: Path, plan: ConversionPlan) -> None:
    """Write what was trained, in the first process; the others are left when it needs them no more.

    Args:
        trainer: A Trainer that has trained; every process calls this.
        untrained: The conversion before training.
        out: Folder to write; replaced if it exists.
        plan: The conversion.
    """
    training, dtype = plan.recipe.training, training_dtype(plan.recipe.training)
    if training.keeps_base:
        adapter = gathered_adapter(trainer)
        if _is_left_to(trainer):
            write_gated(adapter, untrained, out)
        return
    if in_shards(trainer):
        attention = plan.adapter.implementations[0]
        hollow = hollow_model(untrained, plan.adapter, dtype=dtype, attention=attention)
        if hollow is not None:
            write = write_shards if training.method == "full" else write_merged
            write(trainer, hollow, untrained, out, plan)
            return
    weights = gathered_weights(trainer) if is_sharded(trainer) else None
    if not _is_left_to(trainer):
        return
    model = trainer.model
    if weights is not None or is_quantized(training):
        whole = load_model(untrained, plan.adapter, dtype=dtype)
        whole = make_trainable(whole, plan.adapter, training)
        if weights is None:
            whole = transplant(model, whole)
        else:
            whole.load_state_dict(weights)
        model = whole
    write_trained(model, untrained, out, plan)


def _is_left_to(trainer: Any) -> bool:
    """Leave the other processes; whether what comes is this one's."""
    main = bool(trainer.args.process_index == 0)
    # transformers talks to the others while it loads and saves, and they are done.
    part(trainer.model_wrapped)
    return main


def write_shards(
    trainer: Any, hollow: Any, untrained: Path, out: Path, plan: ConversionPlan
) -> None:
    """Write the weights of a fully trained model, gathered one by one.

    Args:
        trainer: Its Trainer; every process calls this.
        hollow: The same model without its weights.
        untrained: The conversion before training.
        out: Folder to write; replaced if it exists.
        plan: The conversion.
    """
    main = trainer.args.process_index == 0
    layout = layout_of(hollow, _stored_dtype(untrained))
    buffers = dict(hollow.named_buffers())
    found = {name: weight for weight, names in names_of(trainer.model).items() for name in names}
    with _appearing(untrained, out) if main else nullcontext(out) as partial:
        write_weights(
            partial,
            layout,
            lambda name: buffers[name] if name in buffers else gathered(found[name]),
            writes=main,
        )
        part()


def write_merged(
    trainer: Any, hollow: Any, untrained: Path, out: Path, plan: ConversionPlan
) -> None:
    """Write a model with what LoRA trained merged into its base, which is read from its files.

    Args:
        trainer: Its Trainer; every process calls this.
        hollow: The base without its weights.
        untrained: The conversion before training.
        out: Folder to write; replaced if it exists.
        plan: The conversion.
    """
    layout = layout_of(hollow, _stored_dtype(untrained))
    model = make_trainable(hollow, plan.adapter, plan.recipe.training)
    found = {own_name(name): weight for name, weight in trainer.model.named_parameters()}
    # What is trained is asked of the new model: switching an adapter off and on while FSDP holds
    # a layer whole leaves its shards marked as frozen.
    trained = {
        name: gathered(found[name])
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    if not _is_left_to(trainer):
        return
    merged = MergedWeights(model, trained, untrained)
    with _appearing(untrained, out) as partial:
        if plan.recipe.training.keep_adapter:
            if plan.mask.rows_after != plan.mask.rows_before:
                merged.fill_embeddings()
            save_adapter(model, partial / ADAPTER, plan)
        write_weights(partial, layout, merged, writes=True)


@contextmanager
def _appearing(untrained: Path, out: Path) -> Iterator[Path]:
    """Give a folder with an untrained conversion but for its weights; it replaces `out` whole."""
    partial = out.with_name(out.name + ".partial")
    for leftover in (partial, out):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(untrained, partial, ignore=shutil.ignore_patterns(*WEIGHT_PATTERNS))
    yield partial
    sync_tree(partial)
    partial.rename(out)


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
    recipe = plan.recipe
    with _appearing(untrained, out) as partial:
        if recipe.training.method == "lora":
            if recipe.training.keep_adapter:
                save_adapter(model, partial / ADAPTER, plan)
            tied = model.config.tie_word_embeddings
            model = model.merge_and_unload()
            if model.config.tie_word_embeddings != tied:
                raise DllmConvertError(
                    "merging the adapter left the head apart from the embeddings it is tied to",
                    hint="Use --full, or --set training.lora.embeddings=mask_row",
                )
        weights = partial / "weights"
        stored = _stored_dtype(untrained)
        model.to(stored).save_pretrained(weights, max_shard_size=MAX_FILE)
        for pattern in WEIGHT_PATTERNS:
            for file in weights.glob(pattern):
                file.rename(partial / file.name)
        shutil.rmtree(weights)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type most weights of a checkpoint are stored in."""
    sizes: Counter[str] = Counter()
    for header in read_checkpoint(folder).values():
        for entry in header.entries.values():
            sizes[entry.dtype] += entry.end - entry.start
    return _TORCH_DTYPES.get(sizes.most_common(1)[0][0], torch.float32)
