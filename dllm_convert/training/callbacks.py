"""What watches a training: metrics.jsonl, progress, the NaN guard, the clock, saving in time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dllm_convert.common.console import Task
from dllm_convert.common.interruption import Interruption
from dllm_convert.errors import DllmConvertError
from dllm_convert.recipe.schema import Training
from dllm_convert.training.consensus import Consensus, barrier
from dllm_convert.training.expectation import StartCheck
from dllm_convert.training.metrics import GIB, Metrics, peak_memory
from dllm_convert.training.pacing import Pace, end_with, found_pace
from dllm_convert.training.resume import (
    Resumption,
    last_whole_checkpoint,
    make_room,
    mark_whole,
    rotate,
)

LOGGED = (
    "loss",
    "nelbo",
    "divergence",
    "own_divergence",
    "cosine",
    "entropy",
    "block_size",
    "learning_rate",
    "grad_norm",
)


@dataclass(frozen=True)
class Rules:
    """What a training is held to.

    Attributes:
        tokens_per_step: Clean tokens of an optimizer step over all processes, padding included.
        keep_checkpoints: Resumable checkpoints to keep.
        max_minutes: Training time after which to stop, earlier sessions included.
        rate_field: The recipe's field of the learning rate.
        steps: Planned steps, of which a time limit may leave fewer.
        schedule: The part of the recipe that says how the learning rate goes.
        rows_per_step: Sequences of an optimizer step over all processes; 0 if nobody counts them.
    """

    tokens_per_step: int
    keep_checkpoints: int = 2
    max_minutes: float | None = None
    rate_field: str = "training.learning_rate"
    steps: int = 0
    schedule: Training | None = None
    rows_per_step: int = 0


class ProgressCallback(TrainerCallback):
    """Writes a line per log, shows progress, saves and stops on request, on time and on NaN.

    Every process has one. They decide together: what one of them notices all act on at one step.

    Args:
        metrics: The run's log.
        resumed: Where the run goes on.
        rules: What it is held to.
        task: Progress that counts optimizer steps.
        interruption: Tells that the process is to end.
        unsound: Returns whether a loss was not a number since training began, shape (), bool.
        opening: Judges where the loss starts; None if nothing is known of that.
        warn: Told if it starts elsewhere.
        pace: What the time limit came to in an earlier session; None if that is not known.
        settled: Keeps what it comes to, before a step is taken that depends on it.
    """

    def __init__(
        self,
        metrics: Metrics,
        resumed: Resumption,
        rules: Rules,
        task: Task,
        interruption: Interruption,
        unsound: Callable[[], torch.Tensor],
        opening: StartCheck | None = None,
        warn: Callable[[str], None] = lambda text: None,
        pace: Pace | None = None,
        settled: Callable[[Pace], None] = lambda pace: None,
    ) -> None:
        self._pace = pace
        self._settled = settled
        self._durations: list[float] = []
        self._metrics = metrics
        self._rules = rules
        self._task = task
        self._interruption = interruption
        self._unsound = unsound
        self._opening = opening
        self._warn = warn
        self._step = self._resumed = resumed.step
        self._earlier_seconds = float(metrics.last.get("seconds", 0.0))
        self._earlier_tokens = int(metrics.last.get("tokens", 0))
        self._started = time.monotonic()
        self._line_at = (self._earlier_seconds, self._earlier_tokens)
        self._consensus: Consensus | None = None
        self.interrupted = False
        self.stopped = resumed.stopped

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds, sessions before a resume included."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def tokens(self) -> int:
        """Clean tokens of all processes so far, sessions before a resume included."""
        return self._earlier_tokens + (self._step - self._resumed) * self._rules.tokens_per_step

    @property
    def final_loss(self) -> float | None:
        """Last logged loss, in nats."""
        loss = self._metrics.last.get("loss")
        return None if loss is None else float(loss)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the clock when the first step starts, not when the model is prepared."""
        self._started = time.monotonic()
        self._consensus = Consensus(args.device)
        self._task.begin(self._resumed)
        self._stepped = self._started
        if self._pace is not None:
            self._keep_to(self._pace, state, kwargs["lr_scheduler"])
        elif self._limit is not None:
            self._task.expect(seconds=self._limit - self.seconds)

    @property
    def _limit(self) -> float | None:
        """Training time there is, in seconds."""
        minutes = self._rules.max_minutes
        return None if minutes is None else minutes * 60

    def _keep_to(self, pace: Pace, state: TrainerState, scheduler: Any) -> None:
        """End with as many steps as there is time for, the learning rate as well."""
        self._pace = pace
        state.max_steps = pace.steps
        if self._rules.schedule is not None:
            end_with(scheduler, pace, self._rules.schedule)
        self._task.expect(pace.steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bar; stop when the time is up, when asked to, or on a loss that is no number."""
        self._step = state.global_step
        self._task.advance(1, *self._notes())
        found = self._timed()
        first = state.is_world_process_zero
        unsound, asked, late, timed = self._agree(first and found is not None)
        if timed and self._pace is None and self._consensus is not None:
            # What the first process found, everywhere.
            pace = Pace(self._step, self._consensus.told(found.steps if found else 0))
            self._settled(pace)
            self._keep_to(pace, state, kwargs["lr_scheduler"])
        if unsound:
            control.should_log = True
        elif state.global_step < state.max_steps and (asked or late):
            self.stopped = "" if asked else "time"
            control.should_training_stop = control.should_save = True
        elif state.global_step >= state.max_steps and state.max_steps < self._rules.steps:
            self.stopped = "time"
        self.interrupted = asked
        if control.should_save:
            # What is saved is looked at first, see `on_log`.
            control.should_log = True
            if state.is_world_process_zero:
                make_room(Path(str(args.output_dir)))

    def _timed(self) -> Pace | None:
        """Return how many steps there is time for, once that can be told and was not yet."""
        now = time.monotonic()
        self._durations.append(now - self._stepped)
        self._stepped = now
        if self._limit is None or self._pace is not None:
            return None
        return found_pace(self._durations, self.seconds, self._step, self._limit, self._rules.steps)

    def _agree(self, timed: bool) -> tuple[bool, ...]:
        late = self._limit is not None and self.seconds >= self._limit
        if self._consensus is None:
            raise RuntimeError("a step ended before training began")
        return self._consensus.any(self._unsound(), self._interruption.requested, late, timed)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append to metrics.jsonl; refuse to go on from a loss that is not a number."""
        if not logs or "loss" not in logs:
            return
        if not all(math.isfinite(logs[name]) for name in ("loss", "grad_norm") if name in logs):
            raise self._diverged(Path(str(args.output_dir)), state, logs, args.learning_rate)
        loss, seconds, tokens = logs["loss"], self.seconds, self.tokens
        passed = seconds - self._line_at[0]
        rate = (tokens - self._line_at[1]) / passed if passed > 0 else 0.0
        self._line_at = seconds, tokens
        self._metrics.append(
            {
                "step": state.global_step,
                "seconds": round(seconds, 3),
                "tokens": tokens,
                "tokens_per_second": round(rate, 1),
                **{name: logs[name] for name in LOGGED if name in logs},
                "memory_gib": round(peak_memory() / GIB, 3),
            }
        )
        if self._opening is not None and (problem := self._opening.see(logs.get("nelbo", loss))):
            self._warn(problem)

    def _notes(self) -> list[str]:
        line = self._metrics.last
        shown = {"loss": "loss", "nelbo": "nelbo", "own_divergence": "from the base on own text"}
        parts = [f"{said} {line[name]:.3f}" for name, said in shown.items() if name in line]
        elapsed = time.monotonic() - self._started
        done = self._step - self._resumed
        if elapsed > 0:
            parts.append(f"{done * self._rules.tokens_per_step / elapsed:,.0f} tokens/s")
        parts.append(f"{peak_memory() / GIB:.2f} GiB")
        return parts

    def _diverged(
        self, folder: Path, state: TrainerState, logs: dict[str, float], rate: float
    ) -> DllmConvertError:
        last = last_whole_checkpoint(folder)
        kept = f"the last good checkpoint is kept in {last}" if last else "nothing was saved yet"
        return DllmConvertError(
            f"training diverged at step {state.global_step}: loss {logs['loss']}, "
            f"gradient norm {logs.get('grad_norm')}; {kept}",
            hint="Start again in another --out with a lower rate, such as "
            f"--set {self._rules.rate_field}={rate / 3:.0e}",
        )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make the checkpoint count once every process has written its part; drop older ones."""
        barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        self._metrics.sync()
        mark_whole(
            folder / f"checkpoint-{state.global_step}",
            stopped=self.stopped,
            rows=self._rules.rows_per_step,
        )
        rotate(folder, self._rules.keep_checkpoints)
