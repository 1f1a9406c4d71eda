"""The training stage: an untrained conversion goes in, a trained checkpoint comes out."""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from dllm_convert.console import Reporter
from dllm_convert.diffusion.objective import Objective
from dllm_convert.errors import DllmConvertError
from dllm_convert.plan import ConversionPlan
from dllm_convert.safetensors_header import read_checkpoint
from dllm_convert.schema import Recipe
from dllm_convert.training.adapter_files import ADAPTER, save_adapter
from dllm_convert.training.callbacks import Watch, checkpoint_step, last_whole_checkpoint
from dllm_convert.training.checkpointing import checkpoint_activations
from dllm_convert.training.data import TextData, collate
from dllm_convert.training.setup import (
    count_trainable,
    load_model,
    make_trainable,
    training_dtype,
    use_bf16,
)
from dllm_convert.training.trainer import DiffusionTrainer

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class TrainResult:
    """What training did.

    Attributes:
        method: full or lora.
        steps: Optimizer steps taken.
        tokens: Clean tokens seen, padding included, this session's only if it was resumed.
        seconds: Training time, sessions before a resume included.
        trainable_parameters: Parameters that received gradients.
        final_loss: Last logged loss, in nats.
        stopped: Why it ended: `steps` or `time`.
        device: What computed, such as the name of the GPU.
        devices: How many of them.
    """

    method: str
    steps: int
    tokens: int
    seconds: float
    trainable_parameters: int
    final_loss: float | None
    stopped: str
    device: str
    devices: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return asdict(self)


def _arguments(recipe: Recipe, folder: Path, bf16: bool, streaming: bool) -> TrainingArguments:
    training = recipe.training
    every = training.save_steps or max(10, training.steps // 5)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_schedule,
        warmup_steps=round(training.warmup_ratio * training.steps),
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=bf16,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        # A multiple of the logging steps: a loss that is not a number is seen before it is saved.
        save_steps=-(-every // training.log_steps) * training.log_steps,
        save_total_limit=2,
        seed=training.seed,
        data_seed=training.seed,
        # Rows come in their order: prepared ones are skipped by number, a stream starts anywhere.
        train_sampling_strategy="sequential",
        ignore_data_skip=streaming,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # Several GPUs in one process would be DataParallel, which splits masks and flat indices apart.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def train(
    plan: ConversionPlan, data: TextData, untrained: Path, out: Path, work: Path, reporter: Reporter
) -> TrainResult:
    """Train, resuming from the last whole checkpoint, and write the result.

    Args:
        plan: The conversion.
        data: Training rows.
        untrained: Converted checkpoint to start from.
        out: Folder to write the trained checkpoint to; replaced if it exists.
        work: Folder of trainer checkpoints and metrics.jsonl.
        reporter: Progress.

    Raises:
        DllmConvertError: If the loss stops being a number.
    """
    recipe = plan.recipe
    # The Trainer seeds itself too late for this: LoRA's matrices are drawn before it exists.
    set_seed(recipe.training.seed)
    base = load_model(untrained, plan.adapter, dtype=training_dtype(recipe.training))
    checkpoint_activations(base, recipe.training.gradient_checkpointing)
    model = make_trainable(base, plan.adapter, recipe.training)
    trainable = count_trainable(model)
    folder = work / "trainer"
    resume = last_whole_checkpoint(folder)
    resumed = checkpoint_step(resume) if resume else 0
    if resumed:
        reporter.line(f"resuming from step {resumed}")
    arguments = _arguments(recipe, folder, use_bf16(recipe.training), data.streaming)
    rows = recipe.training.batch_size * recipe.training.gradient_accumulation * arguments.world_size
    with reporter.task("train", total=recipe.training.steps) as task:
        watch = Watch(work / "metrics.jsonl", resumed, recipe.training.max_minutes, task)
        trainer = DiffusionTrainer(
            model=model,
            args=arguments,
            train_dataset=data.training_rows(
                start=resumed * rows, total=recipe.training.steps * rows
            ),
            data_collator=collate,
            callbacks=[watch],
            recipe=recipe,
            objective=Objective.from_config(base.config),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = watch.seconds
    _write(trainer.model, untrained, out, plan)
    return TrainResult(
        recipe.training.method,
        trainer.state.global_step,
        trainer.tokens_seen,
        round(seconds, 3),
        trainable,
        watch.last.get("loss"),
        watch.stopped,
        _device_name(),
        trainer.args.world_size,
    )


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else f"CPU ({platform.machine()})"


def _write(model: Any, untrained: Path, out: Path, plan: ConversionPlan) -> None:
    """Write trained weights beside the untouched files of the untrained conversion."""
    recipe = plan.recipe
    shutil.rmtree(out, ignore_errors=True)
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


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type most weights of a checkpoint are stored in."""
    sizes: Counter[str] = Counter()
    for header in read_checkpoint(folder).values():
        for entry in header.entries.values():
            sizes[entry.dtype] += entry.end - entry.start
    return _TORCH_DTYPES.get(sizes.most_common(1)[0][0], torch.float32)
