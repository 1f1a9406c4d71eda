"""What is to be evaluated, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dllm_convert.evaluation.settings import Settings, find_published
from dllm_convert.source.info import SourceInfo


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        checkpoint: Folder of the conversion.
        tasks: Names of lm-eval's tasks.
        base: Folder or Hub id of the base, None to leave it out.
        include: Folders with more tasks.
        limit: Most items per task.
        batch_size: Continuations or prompts per forward.
        thresholds: Confidence thresholds to sweep; empty for the settings' own.
        batch_sizes: Prompts per forward to sweep them with; empty for `batch_size` alone.
        chat: Whether prompts go through the chat template.
        shots: Examples before each question, None for what is published or the task's own number.
        unsafe_code: Whether tasks may run the code that a model wrote.
        published: Name of published settings, for their number of examples.
        data: Text to measure, as a recipe's `data.source`; of what was trained on, only what was
            held out.
        text_field: Column that holds the text of `data`; None for the one that was trained on.
        settings: How likelihoods are estimated and text is written.
        verifier: Another model, from its headers, whose text and likelihoods they are; None for
            none.
        record: Folder to record what is found in, instead of the checkpoint's manifest.
        name: What to call the conversion there, with the commit if it is of the Hub; None calls it
            by the last part of its path and its state.
    """

    checkpoint: Path
    tasks: tuple[str, ...] = ()
    base: str | None = None
    include: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int = 8
    thresholds: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    chat: bool = False
    shots: int | None = None
    unsafe_code: bool = False
    published: str | None = None
    data: str | None = None
    text_field: str | None = None
    settings: Settings = field(default_factory=Settings)
    verifier: SourceInfo | None = None
    record: Path | None = None
    name: str | None = None

    @property
    def home(self) -> Path:
        """Folder in which what is found is kept and recorded."""
        return self.record or self.checkpoint

    def shots_of(self, task: str) -> int | None:
        """Examples before each question of a task, None for its own number."""
        if self.shots is not None or self.published is None:
            return self.shots
        return find_published(self.published).shots.get(task)
