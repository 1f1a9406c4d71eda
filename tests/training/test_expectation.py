"""A run that starts wrong says why: each fault is planted, and found; sound runs say nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from factory import FAMILIES
from test_trainer import converted

from dllm_convert.common.console import Reporter
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import predict
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.modeling.loading import load_model
from dllm_convert.training.data.text_facts import Text, text_statistics
from dllm_convert.training.expectation import Start, StartCheck, explain, noise_variance, survey
from dllm_convert.training.run import train

SOUND = Text((0, 0.05), 0.0, 0.0)
START = Start(6.0, 0.1, 500, 6.1, 4.0, 0.3)


class Heard(Reporter):
    """Remembers what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def measured(model: Any, batches: tuple[TextBatch, ...]) -> dict[str, Any]:
    objective = Objective.from_config(model.config)
    return {"nelbo_before": nelbo(model, batches, objective, seed=0).as_dict()}


def start_of(model: Any, batches: tuple[TextBatch, ...], text: Text = SOUND) -> Start:
    return survey(model, batches, measured(model, batches), text, seed=0)


@pytest.mark.parametrize("draw", ["count", "time"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_run_of_every_family_is_not_flagged(
    family: str, draw: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan, data = converted(source_cache(family), tmp_path / "a")
    recipe = plan.recipe.model_copy(
        update={"noise": plan.recipe.noise.model_copy(update={"draw": draw})}
    )
    plan, heard = replace(plan, recipe=recipe), Heard()
    start = start_of(load_model(tmp_path / "a", plan.adapter), data.held_out)
    assert explain(start) == []
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", heard, start)
    assert heard.warnings == []
    assert sum(line.startswith("expected at step 0: NELBO") for line in heard.lines) == 1


@pytest.fixture(scope="module")
def sound(
    source_cache: SourceFactory, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, tuple[TextBatch, ...]]:
    folder = tmp_path_factory.mktemp("sound") / "a"
    plan, data = converted(source_cache("llama"), folder)
    return load_model(folder, plan.adapter), data.held_out


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_a_mask_row_that_was_never_trained_is_named(
    scale: float, sound: tuple[Any, tuple[TextBatch, ...]]
) -> None:
    model, batches = sound
    row = model.get_input_embeddings().weight.data[model.config.mask_token_id]
    before = row.clone()
    row.mul_(scale)
    try:
        start = start_of(model, batches)
    finally:
        row.copy_(before)
    (problem,) = explain(start)
    assert "mask row" in problem
    assert str(model.config.mask_token_id) in problem
    assert explain(start_of(model, batches)) == []


def overfit(model: Any, batch: TextBatch, objective: Objective) -> None:
    """Learn one batch by heart, so that reading it elsewhere is confidently wrong."""
    process, rows = ForwardProcess(draw="count"), len(batch.tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(300):
        views = corrupt(batch, objective, process, NoiseKey(0, step, 0, rows))
        forward = predict(batch, views, objective)
        mask = forward.dense_mask()
        logits = model(**forward.inputs, attention_mask=mask, use_cache=False).logits
        loss = forward.nats(logits, objective).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def trained_the_other_way(
    sound: tuple[Any, tuple[TextBatch, ...]],
) -> Iterator[tuple[Any, tuple[TextBatch, ...]]]:
    model, batches = sound
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = batches[:1]
    objective = Objective.from_config(model.config)
    other = replace(objective, token_shift=not objective.token_shift)
    overfit(model, batches[0], other)
    yield model, batches
    model.load_state_dict(before)


def test_the_other_token_shift_is_named(
    trained_the_other_way: tuple[Any, tuple[TextBatch, ...]],
) -> None:
    start = start_of(*trained_the_other_way)
    assert start.nelbo > start.guess
    (problem,) = explain(start)
    # How far above guessing it is, and so whether the problem has a head, depends on rounding.
    assert "token shift: drop gives" in problem
    assert "--set token_shift=drop" in problem


def test_a_broken_base_without_a_known_cause_says_so(
    sound: tuple[Any, tuple[TextBatch, ...]],
) -> None:
    model, batches = sound
    head = model.get_output_embeddings().weight.data
    head.mul_(20)
    try:
        (problem,) = explain(start_of(model, batches))
    finally:
        head.div_(20)
    assert "neither the mask's row" in problem


class Tokenizer:
    """As much of a tokenizer as is asked for."""

    unk_token_id, eos_token_id, sep_token_id = 3, 1, None


def rows(tokens: torch.Tensor, padded: int = 0) -> list[TextBatch]:
    count, length = tokens.shape
    segments = torch.zeros_like(tokens)
    segments[:, length - padded :] = -1
    return [TextBatch(tokens, segments, torch.arange(length).expand(count, length))]


def test_text_that_is_not_text_is_named() -> None:
    varied = torch.arange(400).view(4, 100) + 10
    assert text_statistics(rows(varied), Tokenizer()).problems == []
    same, unknown = varied.clone(), varied.clone()
    same[:, ::2] = 7
    unknown[:, ::5] = 3
    assert (
        "49% of the scored tokens are token 7"
        in text_statistics(rows(same), Tokenizer()).problems[0]
    )
    (problem,) = text_statistics(rows(unknown), Tokenizer()).problems
    assert "19% of the scored tokens are unknown" in problem
    (problem,) = text_statistics(rows(varied, padded=80), Tokenizer()).problems
    assert "80% of the rows is padding" in problem
    # End tokens that fill a row, and are learnt on purpose, are no fault.
    filled = varied.clone()
    filled[:, 40:] = Tokenizer.eos_token_id
    assert text_statistics(rows(filled), Tokenizer()).problems
    assert text_statistics(rows(filled), Tokenizer(), filled=True).problems == []


@pytest.mark.parametrize("word", ["a", "\N{SNOWMAN}"])
def test_one_repeated_token_is_named_in_a_run(
    word: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    from tiny_runs import recipe

    from dllm_convert.pipeline.run import run

    # BERT's tokenizer has never seen a snowman.
    family = "bert" if word == "\N{SNOWMAN}" else "llama"
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{word} " * (50 + n) for n in range(30)))
    asked = recipe(source_cache(family), "mdlm", steps=2)
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"source": str(path)})})
    heard = Heard()
    run(asked, tmp_path / "out", heard)
    assert any("data: " in warning for warning in heard.warnings)


def test_the_noise_of_a_batch_is_that_of_the_masks() -> None:
    """Monte Carlo: a loss of one nat everywhere, summed over drawn masks."""
    schedule = Schedule("linear", min_time=0.05)
    # Blocks of one token; the first of a text is not scored, so positions begin at 1.
    tokens = torch.zeros(64, 256, dtype=torch.long)
    batch = TextBatch(tokens, tokens, torch.arange(1, 257).expand(64, -1))
    objective, process = Objective("bd3lm", 1, False, 1), ForwardProcess(schedule)
    means = torch.stack(
        [
            corrupt(batch, objective, process, NoiseKey(0, draw, 0, 64))[0].weight.mean()
            for draw in range(200)
        ]
    )
    expected = math.sqrt(noise_variance(schedule, by_count=False) / tokens.numel())
    assert float(means.std()) == pytest.approx(expected, rel=0.2)
    assert noise_variance(schedule, by_count=True) == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((6.0, 6.1, 5.9), None),
        ((6.0, 60.0, 5.9), None),
        ((9.0, 9.1, 5.9), "starts at a NELBO of 9.00"),
        ((0.5, 0.4, 0.5), "much simpler than the held-out text"),
        ((9.0, 9.1), None),
        ((0.0, 0.0, 0.0), "learns nothing"),
    ],
)
def test_where_the_loss_starts(values: tuple[float, ...], said: str | None) -> None:
    opening = StartCheck(START, tokens=500, variance=0.0)
    low, high = opening.range
    assert low < 6 < high
    heard = [opening.see(value) for value in values]
    assert opening.see(100.0) is None or len(values) < 3
    if said is None:
        assert heard == [None] * len(values)
    else:
        assert heard[:-1] == [None] * (len(values) - 1)
        assert said in str(heard[-1])


def test_a_known_problem_is_the_explanation() -> None:
    opening = StartCheck(replace(START, problems=("mask row: none",)), tokens=500, variance=0.0)
    heard = [opening.see(value) for value in (9.0, 9.0, 9.0)]
    assert str(heard[-1]).endswith("; mask row: none")


def test_one_held_out_sequence_is_said_and_makes_no_range(
    sound: tuple[Any, tuple[TextBatch, ...]],
) -> None:
    model, batches = sound
    first = {n: v if v is None else v[:1] for n, v in vars(batches[0]).items()}
    start = start_of(model, (TextBatch(**first),))
    (problem,) = explain(start)
    assert "one sequence of" in problem and "data.held_out_source" in problem
    said = StartCheck(start, tokens=500, variance=0.0).announce()
    assert "nobody can tell" in said and "inf" not in said and f"{start.nelbo:.2f}" in said


def test_a_training_of_nothing_is_said_whatever_was_expected() -> None:
    for start in (START, replace(START, stderr=math.inf)):
        opening = StartCheck(start, tokens=500, variance=0.0)
        assert [opening.see(0.0) for _ in range(2)] == [None, None]
        assert "no token of its rows is trained" in str(opening.see(0.0))
