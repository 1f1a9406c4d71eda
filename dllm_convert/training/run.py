"""The training stage: an untrained conversion goes in, a trained checkpoint comes out."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import OptimizerNames

from dllm_convert.common.console import Reporter, Task
from dllm_convert.common.interruption import Interruption
from dllm_convert.common.memory import free_memory
from dllm_convert.common.ranks import Rank
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.costs import flops_per_token
from dllm_convert.recipe.budget import MOST_EPOCHS
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.asked import (
    annealing_of,
    on_policy_of,
    process_of,
    schedule_of,
    weights_of,
)
from dllm_convert.training.callbacks import ProgressCallback, Rules
from dllm_convert.training.data.rows import collate
from dllm_convert.training.data.text import TextData
from dllm_convert.training.expectation import Start, StartCheck, noise_variance
from dllm_convert.training.exponents import (
    ExponentLearner,
    count_classes,
    read_exponents,
    write_exponents,
)
from dllm_convert.training.metrics import Metrics
from dllm_convert.training.pacing import Pace, warmup_steps
from dllm_convert.training.reporting import keep_in, report_arguments
from dllm_convert.training.resume import (
    Resumption,
    UsedRows,
    check_rows,
    check_sharing,
    find_resumption,
    remove_unfinished,
)
from dllm_convert.training.setup import (
    count_trainable,
    settled_plan,
    teaching_copy,
    trainable_model,
    use_bf16,
)
from dllm_convert.training.trainer import DiffusionTrainer
from dllm_convert.training.writing import write_result


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
        stopped: Why it ended: `steps`, or before all planned ones `time`, or `text`, which was read
            as often as it may be.
        device: What computed, such as the name of the GPU.
        devices: How many of them.
        flops: Floating-point operations, estimated as `costs.flops_per_token` counts them; None if
            the headers told no shapes.
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
    flops: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return asdict(self)


_OPTIMIZERS = {
    "adamw_8bit": OptimizerNames.ADAMW_BNB,
    "paged_adamw_8bit": OptimizerNames.PAGED_ADAMW_8BIT,
}


def _arguments(
    recipe: Recipe, folder: Path, bf16: bool, streaming: bool, pace: Pace | None = None
) -> TrainingArguments:
    training = recipe.training
    steps = training.steps if pace is None else pace.steps
    every = training.save_steps or max(10, training.steps // 5)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=training.sequences_per_forward,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.peak_learning_rate,
        lr_scheduler_type=training.lr_schedule,
        warmup_steps=warmup_steps(training, steps),
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
    )
    if training.optimizer != "adamw":
        arguments.optim = _OPTIMIZERS[training.optimizer]
    # Several GPUs in one process would be DataParallel, which splits masks and flat indices apart.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Timing(NamedTuple):
    """What is known of how many steps a time limit comes to, and who keeps what is found."""

    pace: Pace | None
    settled: Callable[[Pace], None]


def train(
    plan: ConversionPlan,
    data: TextData,
    untrained: Path,
    out: Path,
    work: Path,
    reporter: Reporter,
    start: Start | None = None,
    *,
    pace: Pace | None = None,
    settled: Callable[[Pace], None] = lambda pace: None,
) -> TrainResult:
    """Train, resuming from the last whole checkpoint, and write the result.

    Of several processes each calls this with the same arguments; the first one writes.

    Args:
        plan: The conversion.
        data: Training rows.
        untrained: Converted checkpoint to start from.
        out: Folder to write the trained checkpoint to; replaced if it exists.
        work: Folder of trainer checkpoints and metrics.jsonl.
        reporter: Progress.
        start: What the untrained conversion shows, to compare the first steps with.
        pace: What a time limit came to in an earlier session, None if that is not known.
        settled: Keeps what it comes to, for later sessions.

    Raises:
        DllmConvertError: If the loss stops being a number.
        IncompatibleError: If another strategy is in force than was asked for, or it would go on
            with steps of another size, or without the processes that shared its weights.
    """
    try:
        chosen = settled_plan(plan)
        within = _within_text(chosen, data, reporter)
        planned = within.recipe.training.steps

        def found(pace: Pace) -> None:
            settled(pace)
            if pace.steps < planned:
                reporter.line(f"there is time for {pace.steps:,} of {planned:,} steps")

        timed = _Timing(pace, found)
        result = _train(within, data, untrained, out, work, reporter, start, timed)
        ended_by_text = result.stopped == "steps" and within is not chosen
        return replace(result, stopped="text") if ended_by_text else result
    finally:
        free_memory()


def _within_text(plan: ConversionPlan, data: TextData, reporter: Reporter) -> ConversionPlan:
    """Return a plan of fewer steps where as many as there is time for read the text to death.

    Without a time limit the number of steps is what was asked for, and is refused beforehand.
    """
    recipe = plan.recipe
    training, rows = recipe.training, data.rows_in(MOST_EPOCHS)
    if training.max_minutes is None or recipe.data.allow_epochs or rows is None:
        return plan
    steps = max(rows // (training.sequences_per_step * Rank.from_environment().world), 1)
    if steps >= training.steps:
        return plan
    reporter.warn(
        f"ends after {steps} steps: all of the text is read {MOST_EPOCHS} times by then, and more "
        "teaches it by heart; give more text with --data, or --allow-epochs"
    )
    growth = training.block_growth
    if recipe.growing_sizes:
        # The same share of the steps, and the last ones with blocks that have their size.
        scaled = max(growth.steps * steps // training.steps, len(recipe.growing_sizes))
        growth = growth.model_copy(update={"steps": min(scaled, steps - 1)})
    # What fades over the first steps is over when they are.
    fading = {
        name: getattr(training, name) * steps // training.steps
        for name in ("attention_annealing_steps", "mask_noise_steps")
    }
    fewer = training.model_copy(update={"steps": steps, "block_growth": growth, **fading})
    return replace(plan, recipe=recipe.model_copy(update={"training": fewer}))


def _train(
    plan: ConversionPlan,
    data: TextData,
    untrained: Path,
    out: Path,
    work: Path,
    reporter: Reporter,
    start: Start | None,
    timed: _Timing,
) -> TrainResult:
    recipe, training = plan.recipe, plan.recipe.training
    # The Trainer seeds itself too late for this: LoRA's matrices are drawn before it exists.
    set_seed(training.seed)
    model = trainable_model(plan, untrained)
    trainable = count_trainable(model)
    arguments = _arguments(recipe, work / "trainer", use_bf16(training), data.streaming, timed.pace)
    rows = training.sequences_per_step * arguments.world_size
    resumed = _resume(arguments, rows, reporter)
    with (
        reporter.task("train", total=arguments.max_steps) as task,
        Interruption(gently=True, answer=lambda: reporter.line(_heard(task))) as interruption,
    ):
        text = _rows(data, resumed.step * rows, arguments.max_steps * rows)
        base = teaching_copy(plan, untrained)
        learner = _learner(plan, data, untrained, training.steps * rows)
        trainer = _trainer((model, base), arguments, text, recipe, (untrained, work), learner)
        rules = _rules(recipe, rows)
        metrics = Metrics(work / "metrics.jsonl", resumed.step, writes=_writes(arguments))
        opening = None if resumed.step else _opening(start, recipe, rules.tokens_per_step, reporter)
        timed = _told(timed, trainer)
        unsound, warn = (lambda: trainer.unsound), reporter.warn
        watch = ProgressCallback(
            metrics, resumed, rules, task, interruption, unsound, opening, warn, *timed
        )
        trainer.add_callback(watch)
        _run(trainer, resumed)
        seconds = watch.seconds
    if watch.interrupted or interruption.requested:
        raise KeyboardInterrupt
    result = _result(trainer, watch, plan, trainable, seconds)
    writes = _writes(arguments)  # which nobody knows any more once the others were left
    write_result(trainer, untrained, out, plan)
    if learner is not None and writes:
        write_exponents(out, learner.classes)
    return result


def _learner(
    plan: ConversionPlan, data: TextData, untrained: Path, rows: int
) -> ExponentLearner | None:
    """Make what trains the noise schedule, if that is learnt, on text of so many rows."""
    noise = plan.recipe.noise
    if noise.exponent_rate is None:
        return None
    # What is trained further has classes already.
    classes = read_exponents(untrained, plan.mask.rows_after)
    if classes is None:
        classes = count_classes(data, noise, plan.mask.rows_after, plan.mask.id, rows)
    return ExponentLearner(classes, noise.exponent_rate)


def _heard(task: Task) -> str:
    """Answer a first Ctrl-C: a step may take minutes."""
    return f"finishing step {task.done + 1:g}, saving; again: lose it"


def _trainer(
    models: tuple[Any, Any],
    arguments: TrainingArguments,
    rows: Dataset[Any],
    recipe: Recipe,
    folders: tuple[Path, Path],
    exponents: ExponentLearner | None,
) -> DiffusionTrainer:
    """Make the Trainer of a model and the base it learns from, if that is another.

    The folders are those of the untrained conversion and of the work.
    """
    (model, base), (untrained, work) = models, folders
    trainer = DiffusionTrainer(
        model=model,
        base=base,
        exponents=exponents,
        weights_from=untrained,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        process=process_of(recipe.noise),
        weights=weights_of(recipe.training),
        annealing=annealing_of(recipe),
        on_policy=on_policy_of(recipe),
    )
    trainer.remove_callback(PrinterCallback)
    keep_in(trainer, work)
    return trainer


def _rules(recipe: Recipe, rows: int) -> Rules:
    """Say what a training is held to whose steps take so many rows."""
    training = recipe.training
    return Rules(
        rows * recipe.data.sequence_length,
        training.keep_checkpoints,
        training.max_minutes,
        training.learning_rate_field,
        training.steps,
        training,
        rows,
    )


def _result(
    trainer: DiffusionTrainer,
    watch: ProgressCallback,
    plan: ConversionPlan,
    trainable: int,
    seconds: float,
) -> TrainResult:
    return TrainResult(
        plan.recipe.training.method,
        trainer.state.global_step,
        watch.tokens,
        round(seconds, 3),
        trainable,
        watch.final_loss,
        watch.stopped or "steps",
        _device_name(),
        trainer.args.world_size,
        _flops(trainer, plan, watch.tokens),
    )


def _flops(trainer: DiffusionTrainer, plan: ConversionPlan, tokens: int) -> float | None:
    """Estimate the operations of a whole training; None if the headers told no shapes."""
    if plan.shape is None:
        return None
    return tokens * flops_per_token(plan.shape, plan.recipe, sparse=trainer.sparse)


def _rows(data: TextData, start: int, total: int) -> Dataset[dict[str, Any]]:
    if data.streaming and start >= total:
        # Everything is trained and only has to be written; a stream would give one step more.
        return UsedRows(total)
    return data.training_rows(start=start, total=total)


def _opening(
    start: Start | None, recipe: Recipe, tokens: int, reporter: Reporter
) -> StartCheck | None:
    """Say what to expect of a training that begins; None if nothing is known of that."""
    if start is None:
        return None
    if recipe.growing_sizes:
        # What was measured is of blocks that have their size.
        sizes = ", ".join(map(str, recipe.growing_sizes))
        reporter.line(f"blocks of {sizes} tokens before those of {recipe.block_size}")
        return None
    if recipe.training.on_policy.share:
        # Steps in which the model writes have no bound to compare with.
        share = recipe.training.on_policy.share
        reporter.line(f"the model writes what it is trained on in {share:.0%} of the steps")
        return None
    variance = noise_variance(schedule_of(recipe.noise), by_count=recipe.noise.draw == "count")
    opening = StartCheck(start, tokens * recipe.training.log_steps, variance)
    reporter.line(opening.announce())
    return opening


def _told(timed: _Timing, trainer: DiffusionTrainer) -> _Timing:
    """Return what is known of a time limit, and have a Trainer learn of it too."""
    if timed.pace is not None:
        trainer.keep_to(timed.pace.at, timed.pace.steps)

    def settled(pace: Pace) -> None:
        timed.settled(pace)
        trainer.keep_to(pace.at, pace.steps)

    return _Timing(timed.pace, settled)


def _writes(arguments: TrainingArguments) -> bool:
    """Whether this process is the one that writes."""
    return bool(arguments.process_index == 0)


def _resume(arguments: TrainingArguments, rows: int, reporter: Reporter) -> Resumption:
    """Find where the run goes on, say so, and train no further than it has to.

    Steps have as many rows as they had before.
    """
    folder = Path(str(arguments.output_dir))
    resumed = find_resumption(folder, reporter.warn, clean=_writes(arguments))
    check_rows(resumed, rows)
    if resumed.step:
        reporter.line(f"resuming from step {resumed.step}")
    if resumed.stopped:
        # Its time was up: there is nothing left to train, only to write.
        arguments.max_steps = resumed.step
    if resumed.step >= arguments.max_steps:
        arguments.ignore_data_skip = False
    return resumed


def _run(trainer: DiffusionTrainer, resumed: Resumption) -> None:
    try:
        if resumed.folder is not None:
            fsdp, zero = trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled
            check_sharing(resumed.folder, fsdp=fsdp, zero=zero)
        trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed.folder else None)
    finally:
        if _writes(trainer.args):
            remove_unfinished(Path(str(trainer.args.output_dir)))


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    # Where there is none, torch 2.6 raises.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else f"CPU ({platform.machine()})"
