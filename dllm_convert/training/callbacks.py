"""What watches a training run: metrics.jsonl, the progress bar, the clock, the NaN guard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dllm_convert.console import Task
from dllm_convert.errors import DllmConvertError

COMPLETE_MARKER = "complete"


class Watch(TrainerCallback):
    """Writes a line per log, shows progress, stops on time or on NaN, marks whole checkpoints.

    Args:
        metrics: Path of metrics.jsonl; lines after `resumed_step` are dropped, they are repeated.
        resumed_step: Optimizer step the run goes on from, 0 for a fresh one.
        max_minutes: Training time after which to stop, earlier sessions included.
        task: Progress that counts optimizer steps.
    """

    def __init__(
        self, metrics: Path, resumed_step: int, max_minutes: float | None, task: Task
    ) -> None:
        self._metrics = metrics
        self._limit = max_minutes * 60 if max_minutes else None
        self._task = task
        self._step = resumed_step
        self._earlier = _rewind(metrics, resumed_step)
        self._started = time.monotonic()
        self.stopped = "steps"
        self.last: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds, sessions before a resume included."""
        return self._earlier + time.monotonic() - self._started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock when the first step starts, not when the model is prepared."""
        self._started = time.monotonic()
        self._task.advance(self._step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar; stop when the time is up."""
        note = " ".join(f"{name} {value:.3f}" for name, value in self.last.items())
        self._task.advance(state.global_step - self._step, note)
        self._step = state.global_step
        if (
            self._limit is not None
            and self.seconds >= self._limit
            and state.global_step < state.max_steps
        ):
            self.stopped = "time"
            control.should_training_stop = True

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
        line = {"step": state.global_step, "seconds": round(self.seconds, 3), **logs}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.last = {name: logs[name] for name in ("loss", "nelbo") if name in logs}
        if not all(math.isfinite(logs[name]) for name in ("loss", "grad_norm") if name in logs):
            raise DllmConvertError(
                f"training diverged at step {state.global_step}: loss {logs['loss']}, "
                f"gradient norm {logs.get('grad_norm')}; the last good checkpoint is kept in "
                f"{args.output_dir}",
                hint="Start again in another --out with a lower rate, such as "
                f"--set training.learning_rate={args.learning_rate / 3:.0e}",
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as whole: a kill while it was written leaves none of this file."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        (folder / COMPLETE_MARKER).touch()


def _rewind(metrics: Path, step: int) -> float:
    """Keep the lines up to `step`; return the seconds of the last one."""
    if not metrics.exists():
        return 0.0
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > step:
            break
        kept.append(record)
    metrics.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return float(kept[-1]["seconds"]) if kept else 0.0


def checkpoint_step(folder: Path) -> int:
    """Return the optimizer step in the name of a checkpoint folder."""
    return int(folder.name.rpartition("-")[2])


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was completely written, if any."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_MARKER}")]
    return max(whole, key=checkpoint_step, default=None)
