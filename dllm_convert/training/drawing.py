"""What a step is trained on: its text, the noise over it, and the objective of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from dllm_convert.diffusion.corruption import Corruption, ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.drafts import draft_groups
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import closed_pairs
from dllm_convert.training.data.rows import text_batch
from dllm_convert.training.exponents import ExponentLearner
from dllm_convert.training.growth import Timetable, faded
from dllm_convert.training.on_policy import Writer
from dllm_convert.training.parts import Annealing, ForwardNoise, LossWeights


@dataclass(frozen=True)
class Share:
    """Which part of a step a process has.

    Attributes:
        seed: Seed of the run.
        process: Number of the process.
        processes: How many there are.
    """

    seed: int
    process: int
    processes: int


class StepNoise:
    """Draws the noise of each step's forwards: the same wherever and however often it is drawn.

    Args:
        objective: What is learnt.
        process: How text is corrupted.
        weights: What the loss is made of.
        annealing: What fades or grows over the first steps.
        exponents: Those of a schedule that is learnt, None for another.
        writer: Writes what some steps are trained on; None for never.
        writing: What surrounds it while it writes by an objective.
    """

    def __init__(
        self,
        objective: Objective,
        process: ForwardProcess,
        weights: LossWeights,
        annealing: Annealing,
        *,
        exponents: ExponentLearner | None,
        writer: Writer | None,
        writing: Callable[[Writer, Objective], AbstractContextManager[None]],
    ) -> None:
        self._objective, self._process, self._weights = objective, process, weights
        self._annealing, self._exponents = annealing, exponents
        self._writer, self._writing = writer, writing
        self._timetable = Timetable(annealing.planned)

    def keep_to(self, at: int, steps: int) -> None:
        """Have what fades or grows over a share of the steps end with a time limit.

        Args:
            at: Steps after which the limit was known.
            steps: All steps that there are.
        """
        self._timetable = replace(self._timetable, at=at, steps=steps)

    def objective_at(self, step: int) -> Objective:
        """Return what is learnt in a step: with smaller blocks as long as they grow."""
        growth = self._annealing.blocks
        size = None if growth is None else growth.size_at(self._timetable.in_plan(step))
        objective = self._objective
        if self._exponents is not None:
            objective = replace(objective, classes=self._exponents.classes)
        return objective if size is None else replace(objective, block_size=size)

    def draw(
        self,
        batches: Sequence[Mapping[str, torch.Tensor]],
        step: int,
        share: Share,
        total: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[ForwardNoise]:
        """Draw the noise of a step's forwards; the loss is a mean over all of them.

        In an on-policy step the model writes all of its texts here, before it is trained on any.

        Args:
            batches: Columns of rows, one for each forward of this process.
            step: Optimizer steps that were taken before.
            share: Which part of the step this process has.
            total: Sums over processes, (2,) to (2,).
        """
        objective, writer = self.objective_at(step), self._writer
        if writer is not None and not writer.how.writes(step):
            writer = None
        weights = self._weights if writer is None else self._weights.on_policy
        drawn: list[ForwardNoise] = []
        sums = torch.zeros(2, dtype=torch.float64)
        with nullcontext() if writer is None else self._writing(writer, objective):
            for micro, inputs in enumerate(batches):
                # On the CPU, where it comes from: counting on a GPU has the host wait.
                batch = text_batch({name: value.to("cpu") for name, value in inputs.items()})
                size = len(batch.tokens)
                first = (micro * share.processes + share.process) * size
                rows = len(batches) * share.processes * size
                key = NoiseKey(share.seed, step, first, rows)
                batch, views = self._views(batch, objective, key, writer)
                texts = int(batch.scorable.sum())
                counted = scored = texts * len(views)
                if weights.masked == "uniform":
                    counted = sum(int(view.scored.sum()) for view in views)
                sums += torch.tensor([counted, texts])
                drawn.append(
                    ForwardNoise(
                        objective,
                        weights,
                        batch,
                        views,
                        closed=self._closed(batch.tokens.shape[1], key),
                        key=key,
                        now=self._timetable.in_plan(step),
                        scored=scored,
                        own=writer is not None,
                    )
                )
        items, texts = total(sums).clamp(min=1).tolist()
        return [replace(noise, items=items, texts=texts) for noise in drawn]

    def _views(
        self, batch: TextBatch, objective: Objective, key: NoiseKey, writer: Writer | None
    ) -> tuple[TextBatch, tuple[Corruption, ...]]:
        """The text that is trained on, and the draws of noise over it."""
        if writer is not None:
            return writer.write(batch, objective, key)
        if self._process.draw == "draft":
            return batch, draft_groups(batch, objective, key)
        return batch, corrupt(batch, objective, self._process, key)

    def _closed(self, length: int, key: NoiseKey) -> torch.Tensor | None:
        share = faded(self._annealing.attention_steps, self._timetable.in_plan(key.step))
        if share <= 0:
            return None
        # One draw per step, whatever forward and process: the same pairs are open in all of them.
        return closed_pairs(length, share, key.generator())
