"""The exponents of a schedule that is learnt: counted, trained beside the model, written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.common.json_files import write_config, write_json
from dllm_convert.diffusion.corruption import number_groups
from dllm_convert.diffusion.word_classes import (
    ClassDraw,
    WordClasses,
    classes_by_frequency,
    exponent_gradient,
)
from dllm_convert.errors import IncompatibleError
from dllm_convert.recipe.schema import Noise
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.training.data.rows import collate, text_batch
from dllm_convert.training.data.text import TextData
from dllm_convert.training.parts import ForwardNoise

STATE = "exponents.json"
"""What a checkpoint of a training holds of them."""
COUNTED = 10_000
"""Rows of the training text whose words are counted, at the most."""
_BETAS, _TINY = (0.9, 0.999), 1e-8
_FURTHEST = math.log(20)
"""How far log w may go from 0, where it begins: beyond, a class is masked at one end of time."""


def count_classes(
    data: TextData, noise: Noise, vocabulary: int, mask: int, rows: int
) -> WordClasses:
    """Share words out into classes, by how often the training text has them.

    Args:
        data: Training rows.
        noise: Of the recipe.
        vocabulary: Rows of the embedding.
        mask: Id of the mask.
        rows: Rows of all steps.

    Raises:
        IncompatibleError: The text is streamed, so that nobody can count it beforehand.
    """
    if data.streaming:
        raise IncompatibleError(
            "noise.schedule=learned shares words out by how often the training text has them, and "
            "this text is streamed",
            hint="--set data.streaming=off",
        )
    text: Any = data.training_rows(start=0, total=rows)
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for row in range(min(rows, COUNTED)):
        batch = text_batch(collate([text[row]]))
        counts += torch.bincount(batch.tokens[batch.scorable], minlength=vocabulary)
    members = classes_by_frequency(counts, noise.classes or 1, mask)
    return WordClasses((1.0,) * (len(members) + 1), members, vocabulary)


class ExponentLearner(TrainerCallback):
    """Adam (arXiv 1412.6980) on logarithms of exponents, in float64, on the CPU of every process.

    It is no part of the model: nothing shards, casts or clips it, and no weight decay pulls at it.

    Args:
        classes: Words that share one, and where it begins.
        rate: Learning rate.
    """

    def __init__(self, classes: WordClasses, rate: float) -> None:
        self.classes = classes
        self.total: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone
        self._rate, self._steps = rate, 0
        self._log = classes.weights.log()
        self._first, self._second = torch.zeros(2, len(self._log), dtype=torch.float64)
        self._gradient = torch.zeros_like(self._log)

    def add(self, noise: ForwardNoise, nats: torch.Tensor, slopes: torch.Tensor) -> None:
        """Add a forward's part of the gradient of the step's mean loss.

        Args:
            noise: Its text and noise, in pairs of draws.
            nats: Terms of its masked tokens, view by view, shape (n,).
            slopes: Their derivatives by exponents, shape (n, classes).
        """
        batch = noise.batch
        groups, _ = number_groups(batch.noise_groups(noise.objective).cpu())
        parts = [int(view.scored.sum()) for view in noise.views]
        terms, by_exponents = torch.split(nats.cpu(), parts), torch.split(slopes.cpu(), parts)
        for first in range(0, len(noise.views), 2):
            one, two = noise.views[first : first + 2]
            if one.time is None:
                raise RuntimeError("the noise was drawn without classes")
            draw = ClassDraw(
                batch.tokens, groups, batch.scorable, one.time, (one.scored, two.scored)
            )
            pair = slice(first, first + 2)
            found = exponent_gradient(draw, self.classes, terms[pair], by_exponents[pair])
            self._gradient += found / noise.items

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the exponents by what all forwards and processes of the step found."""
        gradient = self.total(self._gradient) * self._log.exp()
        self._gradient.zero_()
        self._steps += 1
        for moment, beta, seen in (
            (self._first, _BETAS[0], gradient),
            (self._second, _BETAS[1], gradient**2),
        ):
            moment.mul_(beta).add_(seen, alpha=1 - beta)
        first, second = (
            moment / (1 - beta**self._steps)
            for moment, beta in zip((self._first, self._second), _BETAS, strict=True)
        )
        if bool(gradient.isfinite().all()):
            self._log -= self._rate * first / (second.sqrt() + _TINY)
            # Times a factor they are the same process in another time. Nothing holds that factor
            # but where times are cut off (`min_time`), and such a bound rewards a small one.
            self._log -= self._log.mean()
            self._log.clamp_(-_FURTHEST, _FURTHEST)
        self._tell()

    def _tell(self) -> None:
        self.classes = replace(self.classes, exponents=tuple(self._log.exp().tolist()))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write them into the checkpoint, before it counts as whole."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.process_index == 0 and folder.is_dir():
            held: Sequence[torch.Tensor] = (self._log, self._first, self._second)
            values = [part.tolist() for part in held]
            write_json(folder / STATE, {"steps": self._steps, "log": values})

    def load(self, checkpoint: Path) -> None:
        """Go on from what `on_save` wrote.

        Raises:
            IncompatibleError: It is of other classes, or not there.
        """
        path = checkpoint / STATE
        found: Any = load_json_object(path) if path.is_file() else {}
        values = torch.tensor(found.get("log", []), dtype=torch.float64)
        if values.shape != (3, len(self._log)):
            raise IncompatibleError(
                f"{checkpoint.name} has no exponents of {len(self._log)} classes of words",
                hint="Begin anew with another --out",
            )
        self._log, self._first, self._second = values
        self._steps = int(found["steps"])
        self._tell()


def read_exponents(folder: Path, vocabulary: int) -> WordClasses | None:
    """Return the classes of a conversion whose schedule was learnt before; None of another."""
    section = DiffusionSection.of(load_json_object(folder / "config.json")["diffusion"])
    if not section.noise_classes:
        return None
    return WordClasses(section.noise_exponents, section.noise_classes, vocabulary)


def write_exponents(folder: Path, classes: WordClasses) -> None:
    """Write what was learnt into the config.json of a trained conversion."""
    config = load_json_object(folder / "config.json")
    config["diffusion"] |= {
        "noise_exponents": list(classes.exponents),
        "noise_classes": [list(words) for words in classes.members],
    }
    write_config(folder / "config.json", config)
