"""The other benchmarks start, and measure what they say, on tiny conversions."""

from __future__ import annotations

import importlib
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert

from benchmarks import host, quality, sampling, step, textbook
from benchmarks.devices import current_device, held_bytes, peak_bytes, seconds
from benchmarks.gpu.models import build, columns, recipe_of
from benchmarks.steps import ours, textbooks, trained_weights
from dllm_convert.diffusion.objective import Objective

NAMES = sorted(path.stem for path in Path(step.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="module")
def converted(source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "bd3lm"
    convert(source_cache("llama"), folder, "bd3lm", block=32)
    return folder


@pytest.mark.parametrize("kind", list(step.KINDS))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_both_kinds_of_step_learn(converted: Path, kind: str, method: str) -> None:
    options = Namespace(
        converted=converted, method=method, batch=2, length=64, set=["training.precision=fp32"]
    )
    torch.manual_seed(0)
    model, run = step.prepare(options, kind)
    assert model.device == current_device()
    text = step.batch(options, 0)
    losses = [float(run(text)) for _ in range(2)]
    assert all(loss > 0 for loss in losses)
    held, (took, _) = held_bytes(), seconds(lambda: run(text))
    assert took > 0
    assert peak_bytes() > 0 and held > 0


def test_ours_and_the_textbooks_losses_are_of_one_size() -> None:
    """In the mean over draws of noise they are the same bound."""
    recipe = recipe_of("bd3lm", 8, 32, 4, precision="fp32")
    means = []
    for kind in (ours, textbooks):
        model = build("tiny", block=8)
        model.config.diffusion["token_shift"] = False
        objective = Objective.from_config(model.config)
        optimizer = torch.optim.SGD(trained_weights(model), lr=0.0)
        run = kind(model, recipe, objective, optimizer)
        means.append(statistics.mean(float(run(columns(4, 32))) for _ in range(40)))
    # No document's first token is scored in ours.
    assert means[0] == pytest.approx(means[1], rel=0.15)


def test_the_textbooks_mask_is_two_streams() -> None:
    mask = textbook.dense_mask(8, 4, torch.device("cpu"))[0, 0]
    noisy, clean = slice(0, 8), slice(8, 16)
    assert mask[noisy, noisy].sum() == 2 * 16  # its own block
    assert not mask[clean, noisy].any()
    assert mask[4:8, 8:12].all() and not mask[0:4, clean].any()


def test_decoding_is_compared_with_the_textbooks(converted: Path) -> None:
    from transformers import AutoTokenizer

    from dllm_convert.adapters import get_adapter
    from dllm_convert.modeling.loading import load_model

    model = load_model(converted, get_adapter("llama"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    args = Namespace(prompt=32, new=32, steps=4, pairs=1)
    found = sampling.against_reference(model, tokenizer, args)
    # All but for roundings, which decide between the near-equal words of a random model.
    assert found["same_tokens"] > 0.5
    assert 0 < found["share_in_forwards"] <= 1


@pytest.mark.parametrize("kind", ["ours", "textbook-full", "textbook-lora"])
def test_quality_trains_and_measures(
    converted: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    length = ["data.sequence_length=64", "data.max_documents=40", "training.precision=fp32"]
    options = Namespace(
        converted=converted, data="pydoc", set=["training.batch_size=2"], common=length, rows=2,
        seed=0, base=False,
    )  # fmt: skip
    (found,) = quality.run(options, kind, [0.2])
    assert found["steps"] > 0
    assert 0 < found["nats_per_token"] < 20
    assert capsys.readouterr().out.count("\n") == 1


def test_host_times_are_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "KINDS", ("off",))
    found: dict[str, Any] = host.measure(rows=2, length=64, repeats=2)
    assert set(found) == {
        "full, off", "lora, off", "noise", "two streams", "who sees whom", "block mask",
    }  # fmt: skip
    assert all(0 < times.wall[0] <= times.median <= times.wall[-1] for times in found.values())
    assert set(host.GOAL_MS) <= set(found)
