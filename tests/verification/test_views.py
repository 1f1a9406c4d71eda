"""What the pictures show is what the models do: measured on tiny ones, compared with by-hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from diffusion.toys import MASK, packed, single, tiny_model
from typer.testing import CliRunner

from dllm_convert.adapters import get_adapter
from dllm_convert.card.tables import attention_summary, sketch
from dllm_convert.cli.app import app
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import nats_at_rate
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import predict
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.verification import Probe, VerificationReport
from dllm_convert.verification.observe.curves import (
    NEW_TOKENS,
    RATES,
    choose_prompts,
    excerpt,
    measure_decoding,
    measure_rates,
    prompt_length,
)
from dllm_convert.verification.observe.heatmaps import FEWEST_COLUMNS, TOKENS_AT_MOST, map_grid
from dllm_convert.verification.observe.observations import Influence, InfluenceMap, Observations
from dllm_convert.verification.observe.views import observe_checkpoint
from dllm_convert.verification.opening import VerificationRequest

MEASURED = {"probes": [{"name": "attention-sdpa", "passed": True, "measured": "0 wrong"}]}
OBJECTIVES = {
    "mdlm": Objective("mdlm", MASK, token_shift=False),
    "mdlm-shift": Objective("mdlm", MASK, token_shift=True),
    "bd3lm": Objective("bd3lm", MASK, token_shift=True, block_size=4),
}


@pytest.mark.parametrize("block", [None, 1, 3, 4, 16, 32, 64, 100, 512])
@pytest.mark.parametrize("context", [40, 4096])
def test_a_map_is_affordable_and_shows_where_blocks_end(block: int | None, context: int) -> None:
    length, stride = map_grid(block, context)
    columns = -(-length // stride)
    assert length <= context
    assert columns * length <= TOKENS_AT_MOST or columns <= FEWEST_COLUMNS or stride == block
    if block and length > block:
        assert block % stride == 0, "a changed token begins every block"
    if context == 4096:
        assert length >= (block or 0) * 1.5


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "bd3lm"), ("mistral", "mdlm"), ("qwen3", "bd3lm"), ("bert", "mdlm")],
)
def test_the_base_is_a_triangle_and_the_conversion_is_open(
    family: str, target: str, converted_cache: Callable[..., Any]
) -> None:
    made = converted_cache(family, target)
    seen = observe_checkpoint(made.folder, VerificationRequest(made.base), MEASURED)
    influence = seen.influence
    assert influence is not None
    assert influence.base is not None
    opened, pairs = influence.base.ahead
    causal = get_adapter(family).attention == "causal"
    assert opened == (0 if causal else pairs)
    assert influence.opened_as_claimed
    assert influence.converted.ahead == (influence.claimed_ahead, pairs)
    assert 0 < influence.claimed_ahead < pairs or target == "mdlm"
    said = attention_summary(seen)
    assert said is not None
    assert ("inside a block of 8" in said) == (target == "bd3lm")
    assert json.loads(json.dumps(seen.as_dict()))


def test_a_kept_base_has_no_block_of_one() -> None:
    rows = tuple(tuple(0.0 if k <= q else None for k in range(4)) for q in range(4))
    causal = InfluenceMap(rows, stride=1)
    for size, said in ((1, "read from left to right"), (2, "not those 2 that it claims")):
        seen = Observations(influence=Influence(causal, causal, size))
        assert said in str(attention_summary(seen))


def test_a_conversion_that_stayed_causal_is_told(converted: Callable[..., Any]) -> None:
    made = converted("llama", "mdlm")
    config = made.folder / "config.json"
    config.write_text(config.read_text().replace('"is_causal": false', '"is_causal": true'))
    seen = observe_checkpoint(made.folder, VerificationRequest(), MEASURED)
    assert seen.influence is not None
    assert seen.influence.base is None
    assert not seen.influence.opened_as_claimed
    assert "not those 496 that it claims" in str(attention_summary(seen))
    drawn = str(sketch(seen)).splitlines()
    assert drawn[1].startswith("##..")
    assert drawn[-1] == "##" * 16


@pytest.mark.parametrize(
    "probe",
    [
        {"name": "attention-sdpa", "passed": None, "measured": "not measured"},
        {"name": "attention-sdpa", "passed": False, "measured": "could not be measured"},
        {"name": "weights", "passed": True, "measured": "0 wrong"},
    ],
)
def test_attention_that_could_not_be_verified_is_not_drawn(
    probe: dict[str, Any], converted_cache: Callable[..., Any]
) -> None:
    made = converted_cache("llama", "bd3lm")
    assert (
        observe_checkpoint(
            made.folder, VerificationRequest(made.base), {"probes": [probe]}
        ).influence
        is None
    )


def test_the_base_of_the_manifest_stands_in(converted: Callable[..., Any]) -> None:
    made = converted("llama", "bd3lm")
    first = observe_checkpoint(made.folder, VerificationRequest(made.base), MEASURED)
    manifest = {"measurements": first.as_dict() | {"nelbo_after": {"nats_per_token": 2.0}}}
    (made.folder / "dllm_convert.json").write_text(json.dumps(manifest))
    again = observe_checkpoint(made.folder, VerificationRequest(), MEASURED)
    assert again.influence == first.influence
    assert again.held_out == {"nelbo_after": 2.0}


def test_the_command_writes_the_report_and_shows_the_same(
    converted_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = converted_cache("llama", "bd3lm")
    probe = Probe("attention-sdpa", True, "0 pairs wrong", "0")
    verified = VerificationReport((probe,), 1.0)
    monkeypatch.setattr("dllm_convert.verification.verify_checkpoint", lambda *_, **__: verified)
    page = tmp_path / "report.html"
    command = ["verify", str(made.folder), "--against", str(made.base), "--report", str(page)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"Report: {page}" in result.stdout
    assert "##########################" in result.stdout
    assert "base                   0 " in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "exactly those inside a block of 8" in text
    assert "0 pairs wrong" in text
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert document["report"] == str(page)
    assert set(document["measurements"]) == {"influence"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rates_together_are_rates_alone(name: str) -> None:
    """Views of one forward give what a forward for each rate would; masks grow with the rate."""
    model, objective, batch = tiny_model(), OBJECTIVES[name], packed()
    rates = (0.2, 0.6, 1.0)
    found = nats_at_rate(model, [batch], objective, rates, seed=3)
    masked: list[torch.Tensor] = []
    for rate, one in zip(rates, found, strict=True):
        process = ForwardProcess(Schedule(min_time=rate, max_time=rate))
        (view,) = corrupt(batch, objective, process, NoiseKey(3, 0, 0, 3, "measure"))
        forward = predict(batch, (view,), objective)
        with torch.no_grad():
            output = model(**forward.inputs, attention_mask=forward.dense_mask(), use_cache=False)
        nats = forward.nats(output.logits, objective)
        assert one is not None
        assert one.tokens == len(nats) == int(view.scored.sum())
        assert one.nats_per_token == pytest.approx(float(nats.mean()), rel=1e-6)
        masked.append(view.scored)
    assert not (masked[0] & ~masked[1]).any()
    assert torch.equal(masked[2], batch.scorable)


def test_a_model_that_guesses_costs_the_same_at_every_rate() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    for objective in OBJECTIVES.values():
        points = measure_rates(model, [packed(rows=6)], objective, seed=0)
        assert [point.rate for point in points] == list(RATES)
        for point in points:
            # 40 words, of which the mask is none.
            assert point.nats == pytest.approx(math.log(39), rel=1e-6)
            assert point.stderr == pytest.approx(0, abs=1e-6)
    uniform = replace(OBJECTIVES["mdlm"], kernel="uniform")
    assert measure_rates(model, [packed()], uniform, seed=0) == ()


def test_rates_at_which_nothing_is_masked_are_left_out() -> None:
    text = single(torch.tensor([[7, 8]]))
    seeds = [measure_rates(tiny_model(), [text], OBJECTIVES["mdlm"], seed=s) for s in range(8)]
    for points in seeds:
        assert all(point.tokens == 1 and math.isinf(point.stderr) for point in points)
        assert [point.rate for point in points] == list(RATES)[len(RATES) - len(points) :]
    assert min(map(len, seeds)) < len(RATES)


def test_an_excerpt_is_the_beginning_of_the_first_rows() -> None:
    long = single(torch.arange(300).repeat(3, 1))
    silent = TextBatch(*vars(long).values())
    silent = replace(silent, loss=torch.zeros_like(long.tokens, dtype=torch.bool))
    rows = excerpt([silent, long, long], 100)
    assert [tuple(row.tokens.shape) for row in rows] == [(1, 200)] * 4
    assert all(row.scorable.any() for row in rows)


@pytest.mark.parametrize(
    ("block", "context", "length"),
    [
        (None, 4096, 32),
        (1, 4096, 32),
        (8, 4096, 32),
        (32, 4096, 48),
        (64, 4096, 48),
        (512, 4096, 496),
        (8, 40, 24),
        (None, 40, 24),
        (None, 16, 0),
        (64, 40, 0),
    ],
)
def test_prompts_end_where_the_new_tokens_fill_a_block(
    block: int | None, context: int, length: int
) -> None:
    assert prompt_length(block, context) == length
    assert length + NEW_TOKENS <= context or length == 0
    if length and block and block > 1 and context == 4096:
        assert (length + NEW_TOKENS) % block == 0


def test_prompts_are_beginnings_of_documents() -> None:
    batch = packed()
    prompts = choose_prompts([batch], 6, 2)
    assert [prompt.tolist()[0] for prompt in prompts] == batch.tokens[:2, :6].tolist()
    assert choose_prompts([batch], 8, 2) == []


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_decoding_is_compared_with_one_token_per_forward(
    target: str, source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    from dllm_convert.modeling.loading import load_model

    plan = convert(source_cache("llama"), tmp_path / "made", target)
    model = load_model(tmp_path / "made", plan.adapter)
    texts = single(torch.randint(5, 60, (3, 40), generator=torch.Generator().manual_seed(0)))
    points = measure_decoding(model, [texts], context=64)
    assert [point.threshold for point in points] == [None, 0.9, 0.5, 0.2, 0.05]
    assert points[0].agreement == 1
    assert points[0].tokens_per_forward <= 1
    length = prompt_length(8 if target == "bd3lm" else None, 64)
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": ()}
    for point in points:
        forwards = same = 0
        for row in texts.tokens[:2, :length]:
            threshold = point.threshold
            new, slow = (
                model.generate(
                    row[None],
                    confidence_threshold=value,
                    return_dict_in_generate=True,
                    **settings,
                )
                for value in (threshold, None)
            )
            forwards += new.forwards
            same += int((new.sequences == slow.sequences).sum()) - length
        assert point.tokens == 2 * NEW_TOKENS
        assert point.tokens_per_forward == pytest.approx(point.tokens / forwards)
        assert point.agreement == pytest.approx(same / point.tokens)
    assert measure_decoding(model, [texts], context=NEW_TOKENS) == ()
    assert measure_decoding(model, [single(texts.tokens[:, :10])], context=64) == ()
