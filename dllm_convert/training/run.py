"""The training stage: an untrained conversion goes in, a trained checkpoint comes out."""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from dllm_convert.console import Reporter
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.disk import sync_tree
from dllm_convert.errors import DllmConvertError
from dllm_convert.interruption import Interruption
from dllm_convert.plan import ConversionPlan
from dllm_convert.safetensors_header import read_checkpoint
from dllm_convert.schema import Recipe
from dllm_convert.training.adapter_files import ADAPTER, save_adapter
from dllm_convert.training.callbacks import Rules, Watch
from dllm_convert.training.data import TextData, collate
from dllm_convert.training.expectation import Opening, Start, noise_variance
from dllm_convert.training.metrics import Metrics
from dllm_convert.training.reporting import keep_in, report_arguments
from dllm_convert.training.resume import (
    Resumption,
    UsedRows,
    find_resumption,
    remove_unfinished,
)
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
        tokens: Clean tokens seen by all processes, padding included; as `seconds`, over all
            sessions of a run that was resumed.
        seconds: Training time.
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
    # Renamed in transformers 5.x: the old name is understood by all, but only said when needed.
    checkpointing: dict[str, Any] = {}
    if training.gradient_checkpointing:
        checkpointing["gradient_checkpointing"] = True
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
        seed=training.seed,
        data_seed=training.seed,
        # Rows come in their order: prepared ones are skipped by number, a stream starts anywhere.
        train_sampling_strategy="sequential",
        ignore_data_skip=streaming,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **report_arguments(training.report_to, folder.parents[1].name),
        **checkpointing,
    )
    # Several GPUs in one process would be DataParallel, which splits masks and flat indices apart.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def train(
    plan: ConversionPlan,
    data: TextData,
    untrained: Path,
    out: Path,
    work: Path,
    reporter: Reporter,
    start: Start | None = None,
) -> TrainResult:
    """Train, resuming from the last whole checkpoint, and write the result.

    Args:
        plan: The conversion.
        data: Training rows.
        untrained: Converted checkpoint to start from.
        out: Folder to write the trained checkpoint to; replaced if it exists.
        work: Folder of trainer checkpoints and metrics.jsonl.
        reporter: Progress.
        start: What the untrained conversion shows, to compare the first steps with.

    Raises:
        DllmConvertError: If the loss stops being a number.
    """
    recipe = plan.recipe
    # The Trainer seeds itself too late for this: LoRA's matrices are drawn before it exists.
    set_seed(recipe.training.seed)
    base = load_model(untrained, plan.adapter, dtype=training_dtype(recipe.training))
    model = make_trainable(base, plan.adapter, recipe.training)
    trainable = count_trainable(model)
    folder = work / "trainer"
    arguments = _arguments(recipe, folder, use_bf16(recipe.training), data.streaming)
    main = arguments.process_index == 0
    resumed = find_resumption(folder, reporter.warn, clean=main)
    if resumed.step:
        reporter.line(f"resuming from step {resumed.step}")
    if resumed.stopped:
        # Its time was up: there is nothing left to train, only to write.
        arguments.max_steps = resumed.step
    if resumed.step >= arguments.max_steps:
        arguments.ignore_data_skip = False
    rows = recipe.training.batch_size * recipe.training.gradient_accumulation * arguments.world_size
    rules = Rules(
        rows * recipe.data.sequence_length,
        recipe.training.keep_checkpoints,
        recipe.training.max_minutes,
    )
    opening = _opening(start, recipe, rules.tokens_per_step) if not resumed.step else None
    if opening is not None:
        reporter.line(opening.announce())
    metrics = Metrics(work / "metrics.jsonl", resumed.step, writes=main)
    with (
        reporter.task("train", total=recipe.training.steps) as task,
        Interruption(gently=True) as interruption,
    ):
        watch = Watch(
            metrics,
            resumed,
            rules,
            task,
            interruption,
            lambda: trainer.unsound,
            opening,
            reporter.warn,
        )
        trainer = DiffusionTrainer(
            model=model,
            args=arguments,
            train_dataset=_rows(data, resumed.step * rows, arguments.max_steps * rows),
            data_collator=collate,
            callbacks=[watch],
            recipe=recipe,
            objective=Objective.from_config(base.config),
        )
        trainer.remove_callback(PrinterCallback)
        keep_in(trainer, work)
        _run(trainer, resumed, main)
        seconds = watch.seconds
    if watch.interrupted or interruption.requested:
        raise KeyboardInterrupt
    _write(trainer.model, untrained, out, plan)
    return TrainResult(
        recipe.training.method,
        trainer.state.global_step,
        watch.tokens,
        round(seconds, 3),
        trainable,
        watch.final_loss,
        watch.stopped or "steps",
        _device_name(),
        trainer.args.world_size,
    )


def _rows(data: TextData, start: int, total: int) -> Dataset[dict[str, Any]]:
    if data.streaming and start >= total:
        # Everything is trained and only has to be written; a stream would give one step more.
        return UsedRows(total)
    return data.training_rows(start=start, total=total)


def _opening(start: Start | None, recipe: Recipe, tokens: int) -> Opening | None:
    if start is None:
        return None
    variance = noise_variance(
        Schedule.from_recipe(recipe.noise), by_count=recipe.noise.draw == "count"
    )
    return Opening(start, tokens * recipe.training.log_steps, variance)


def _run(trainer: DiffusionTrainer, resumed: Resumption, main: bool) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed.folder else None)
    finally:
        if main:
            remove_unfinished(Path(str(trainer.args.output_dir)))


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else f"CPU ({platform.machine()})"


def _write(model: Any, untrained: Path, out: Path, plan: ConversionPlan) -> None:
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
