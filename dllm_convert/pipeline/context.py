"""What the stages of one run share: what is asked for, where it is made, and what is read once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dllm_convert.common.console import Reporter
from dllm_convert.common.memory import free_memory
from dllm_convert.common.ranks import ALONE, Rank
from dllm_convert.pipeline.options import DEFAULT, RunOptions
from dllm_convert.pipeline.results import StageResult
from dllm_convert.pipeline.workspace import Workspace
from dllm_convert.planning.conversion import ConversionPlan

if TYPE_CHECKING:
    from dllm_convert.source.materialise import Materialised
    from dllm_convert.training.data.text import TextData

Result = TypeVar("Result", bound=StageResult)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        plan: The conversion.
        workspace: Output folder and journal.
        reporter: Progress.
        place: This process.
        how: What does not change the result: links, how much is verified.
    """

    plan: ConversionPlan
    workspace: Workspace
    reporter: Reporter
    place: Rank = ALONE
    how: RunOptions = DEFAULT

    def do(self, stage: Stage[Result]) -> Result:
        """Do a stage, or return what an earlier session of this run found.

        Raises:
            DataError: Another version of the program recorded it.
        """
        record = self.workspace.stage(stage.name, lambda: self._work(stage).as_dict())
        return stage.kind.from_dict(record, self.workspace.journal)

    def _work(self, stage: Stage[Result]) -> Result:
        """Do a stage, and give its memory back before the next one loads a model."""
        try:
            return stage.work(self)
        finally:
            if stage.loads and not self.light:
                free_memory()

    def found(self, stage: Stage[Result]) -> Result | None:
        """Return what a stage found, None if it was not done."""
        record = self.workspace.result(stage.name)
        return None if record is None else stage.kind.from_dict(record, self.workspace.journal)

    @property
    def trains(self) -> bool:
        """Whether anything is learnt."""
        return self.plan.recipe.training.method != "none"

    @property
    def light(self) -> bool:
        """Whether the run does without the model: no training, and only files are verified."""
        return not self.trains and self.how.streams(self.plan.source.parameters)

    @property
    def untrained(self) -> Path:
        """Folder of the conversion before its training."""
        return self.workspace.work / "untrained"

    @property
    def trained(self) -> Path:
        """Folder of the conversion after its training."""
        return self.workspace.work / "trained"

    @property
    def written(self) -> Path:
        """Folder of what the base wrote to be trained on."""
        return self.workspace.work / "written"

    @property
    def weights(self) -> Path:
        """Folder of the weights that are published."""
        return self.trained if self.trains else self.untrained

    # The three below are read at most once, and only by a stage that needs them.

    @cached_property
    def source(self) -> Materialised:
        """The source on this disk, fetched if need be."""
        from dllm_convert.source.materialise import materialise

        return materialise(self.plan.source, self.reporter)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the conversion."""
        from dllm_convert.source.tokenizer_loading import load_tokenizer

        return load_tokenizer(self.untrained)

    @cached_property
    def data(self) -> TextData:
        """Text to train on and held-out text."""
        from dllm_convert.training.base_text import FACTS
        from dllm_convert.training.data.text import prepare_data

        folder, recipe = self.workspace.work / "data", self.plan.recipe
        data = prepare_data(
            *(recipe, self.tokenizer, self.reporter, folder, self.place),
            written=self.written if recipe.data.write_with_base.prompts else None,
        )
        if not recipe.data.write_with_base.prompts:
            return data
        # What was trained on is of the source that was named, not of this folder.
        known = json.loads((self.written / FACTS).read_text(encoding="utf-8"))
        named = {name: known.pop(name) for name in ("source", "kind", "revision")}
        return replace(data, facts={**data.facts, **named, "written_with_base": known})


@dataclass(frozen=True)
class Stage(Generic[Result]):
    """A stage of a run: done once, and recorded when it is.

    Attributes:
        name: What the journal calls it.
        kind: What it finds.
        work: Does it.
        loads: Whether it loads models, as the training does, which frees its own.
    """

    name: str
    kind: type[Result]
    work: Callable[[Run], Result]
    loads: bool = False
