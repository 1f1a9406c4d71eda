"""Decoding as on a GPU: the tokens of decoding on a CPU, whatever is asked for."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import Any

import pytest
import torch
from factory import FAMILIES
from recording import record_on_a_cpu
from tiny_decoders import DECODERS, MASK, WORDS, Forwards, prompt, ragged, tiny
from transformers import PreTrainedModel

from dllm_convert.modeling.published import lockstep, modeling
from dllm_convert.modeling.published.draws import Draws
from dllm_convert.modeling.published.options import DecodingOptions
from dllm_convert.modeling.published.queued import Pace
from dllm_convert.modeling.published.regions import plan_regions, plan_steps

NEW = 13


def options(**fields: Any) -> DecodingOptions:
    return DecodingOptions(**{"mask_token_id": MASK, "max_new_tokens": NEW, **fields})


def generate(
    monkeypatch: pytest.MonkeyPatch,
    is_queued: bool,
    model: PreTrainedModel,
    *args: Any,
    **more: Any,
) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "is_queued", lambda device, options: is_queued)
        given = {"max_new_tokens": NEW, "return_dict_in_generate": True, **more}
        return model.generate(*args, **given)


def both(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, ids: Any, mask: Any, **settings: Any
) -> Any:
    """What is decoded on a CPU and queued, and each row queued alone."""
    expected, got = (
        generate(monkeypatch, way, model, ids, attention_mask=mask, output_order=True, **settings)
        for way in (False, True)
    )
    for row, kept in enumerate(mask.bool()):
        own = dict(settings)
        if "seed" in own:
            own["seed"] = own["seed"] + row
        alone = generate(monkeypatch, True, model, ids[row][kept][None], **own)
        assert torch.equal(alone.sequences[0, -NEW:], got.sequences[row, -NEW:]), row
    return expected, got


SETTINGS: list[dict[str, Any]] = [
    {},
    {"eos_token_id": None},
    {"max_denoising_steps": 2},
    {"confidence_threshold": 0.05},
    {"confidence_threshold": 0.2, "max_denoising_steps": 3},
    {"entropy_bound": 2.0},
    {"unmasking": "margin", "max_denoising_steps": 3},
    {"unmasking": "entropy"},
    {"guidance_scale": 2.0},
    {"guidance_scale": 2.0, "confidence_threshold": 0.05, "suppress_tokens": [9, 12]},
    {"remasking": "low_confidence", "max_denoising_steps": 8, "remasking_ratio": 0.5},
    {"suppress_tokens": list(range(10, 30))},
    {"temperature": 1.0, "top_k": 1},
]
WINDOWS: list[dict[str, Any]] = [
    {"block_length": 4},
    {"block_length": 5, "confidence_threshold": 0.05},
    {"block_length": 64},
]
CASES = [(block, case) for block in (None, 1, 4, 32) for case in SETTINGS]
CASES += [(None, case) for case in WINDOWS]
PARTS: list[dict[str, Any]] = [
    {"sub_block_size": 2},
    {"sub_block_size": 3, "confidence_threshold": 0.05},
    {"sub_block_size": 3, "max_denoising_steps": 2, "eos_token_id": None},
    {"sub_block_size": 2, "guidance_scale": 2.0},
    {"sub_block_size": 8, "entropy_bound": 2.0},
]
CASES += [(block, case) for block in (8, 32) for case in PARTS]


@pytest.mark.parametrize(("block", "settings"), CASES)
@pytest.mark.parametrize("shift", [True, False])
def test_tokens_are_those_of_a_cpu(
    block: int | None, settings: dict[str, Any], shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", block=block, shift=shift)
    for lengths in ([3, 11, 8], [7]) if shift else ([3, 11, 8],):
        expected, got = both(monkeypatch, model, *ragged(lengths), **settings)
        assert torch.equal(expected.sequences, got.sequences)
        assert torch.equal(expected.order > 0, got.order > 0)
        assert int(got.order.max()) <= got.forwards


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_of_every_family(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (None, 4) if family in DECODERS else (None,):
        model = tiny(family, block=block)
        model.set_attn_implementation(implementation)
        expected, got = both(monkeypatch, model, *ragged([3, 11, 8]))
        assert torch.equal(expected.sequences, got.sequences)


@pytest.mark.parametrize("block", [None, 4, 32])
@pytest.mark.parametrize(
    "settings", [{}, {"max_denoising_steps": 2}, {"confidence_threshold": 0.05}]
)
def test_masks_in_prompts(
    block: int | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, mask) = tiny("llama", block=block), ragged([13, 21, 8])
    for row, columns in enumerate([(9, 14), (3, 4, 5, 18), (20,)]):
        ids[row, list(columns)] = MASK
    windows: list[dict[str, Any]] = [{}] if block else [{}, {"block_length": 4}]
    for window in windows:
        expected, got = both(monkeypatch, model, ids, mask, **settings, **window)
        assert torch.equal(expected.sequences, got.sequences)


@pytest.mark.parametrize("threshold", [None, 0.05])
@pytest.mark.parametrize("draft", ["open", "causal"])
def test_a_causal_context(
    draft: str, threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With causal drafts nobody sees ahead, also when rows have left."""
    model = tiny("llama", block=4)
    model.config.diffusion |= {"context": "causal", "draft": draft}
    settings = {"confidence_threshold": threshold}
    for lengths in ([3, 11, 8], [2, 5, 4, 7]):
        expected, got = both(monkeypatch, model, *ragged(lengths), **settings)
        assert torch.equal(expected.sequences, got.sequences)


@pytest.mark.parametrize("draft", ["open", "causal"])
def test_who_sees_whom_when_a_row_has_left(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a block, where somebody watches every step; the others see as before."""
    model, (ids, mask) = tiny("llama", block=8), ragged([3, 11, 8, 5])
    model.config.diffusion |= {"context": "causal", "draft": draft}
    counts: list[int] = []
    for first in range(6, 30, 3):
        settings = {"eos_token_id": list(range(first, first + 8)), "attention_mask": mask}
        settings["observer"] = lambda progress: counts.append(len(progress.rows))
        expected, got = (
            generate(monkeypatch, way, model, ids, **settings) for way in (False, True)
        )
        assert torch.equal(expected.sequences, got.sequences)
    assert sum(0 < after < before for before, after in itertools.pairwise(counts)) > 8


@pytest.mark.parametrize("block", [None, 4])
def test_frequencies_that_depend_on_the_length(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    model = tiny("llama", block=block, max_position_embeddings=12, **fields)
    with pytest.warns(UserWarning, match="context"):
        expected, got = both(monkeypatch, model, *ragged([3, 11, 8]))
    assert torch.equal(expected.sequences, got.sequences)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "confidence_threshold": 0.05},
        {"unmasking": "random"},
        {"remasking": "random", "remasking_ratio": 0.5, "max_denoising_steps": 8},
    ],
)
def test_what_a_row_draws_depends_on_its_seed_alone(
    block: int | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", block=block)
    _, got = both(monkeypatch, model, *ragged([3, 11, 8]), seed=3, **settings)
    again = generate(
        monkeypatch, True, model, *ragged([3, 11, 8])[:1], attention_mask=ragged([3, 11, 8])[1],
        seed=4, **settings,
    )  # fmt: skip
    assert not torch.equal(got.sequences, again.sequences)


@pytest.mark.parametrize("block", [None, 4])
def test_a_uniform_kernel_is_shown_noise(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", block=block)
    model.config.diffusion["noise_kernel"] = "uniform"
    watched = Forwards(monkeypatch, model)
    both(monkeypatch, model, *ragged([3, 11, 8]), seed=3)
    queued_ones = watched.inputs[len(watched.inputs) // 2 :]
    shown = torch.cat([inputs["input_ids"].flatten() for inputs in queued_ones])
    assert shown.max() < WORDS
    # Rows that end early have masks behind their end, which nobody sees.
    assert (shown == MASK).float().mean() < 0.5


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    draws, counts = Draws(options(temperature=1.0, seeds=(5,)), torch.device("cpu")), Counter()
    likely = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    for step in range(4000):
        race = torch.ones(1, 1, 5)
        draws.fill(
            race, lambda b, g: b.exponential_(generator=g), "token", (0, step), [0], [slice(0, 1)]
        )
        counts[int((likely / race[0, 0]).argmax())] += 1
    for token, share in enumerate(likely.tolist()):
        assert abs(counts[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


@pytest.mark.parametrize("block", [None, 4])
def test_rows_that_end_leave(block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", block=block)
    ids = torch.cat([prompt(6, seed=seed) for seed in range(5)])
    free = model.generate(ids, max_new_tokens=40, eos_token_id=None)[:, 6:]
    # Tokens that rows end with early.
    ends = [int(free[row, 2 * row + 1]) for row in range(4)]
    for settings in ({}, {"confidence_threshold": 0.1}, {"guidance_scale": 1.5}):
        watched = Forwards(monkeypatch, model)
        given = {"max_new_tokens": 40, "eos_token_id": ends, **settings}
        expected = generate(monkeypatch, False, model, ids, **given)
        before = len(watched.shapes)
        got = generate(monkeypatch, True, model, ids, **given)
        assert torch.equal(expected.sequences, got.sequences)
        assert got.forwards == len(watched.shapes) - before
        sizes = {rows for rows, _ in watched.shapes[before:]}
        assert block is None or len(sizes) > 1


@pytest.mark.parametrize("block", [None, 4])
def test_an_observer_sees_every_step(block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", block=block)
    ids = torch.cat([prompt(6, seed=seed) for seed in range(3)])
    free = model.generate(ids, max_new_tokens=NEW, eos_token_id=None)[:, 6:]
    for end in (None, int(free[0, 2])):
        shown: list[list[Any]] = [[], []]
        for is_queued, seen in enumerate(shown):

            def look(progress: Any, seen: list[Any] = seen) -> None:
                written = progress.canvas.masked_fill(~progress.committed, MASK).tolist()
                seen.append((progress.forwards, progress.rows.tolist(), written))

            given = {"eos_token_id": end, "observer": look}
            generate(monkeypatch, bool(is_queued), model, ids, **given)
        assert shown[0] == shown[1]


@pytest.mark.parametrize(("block", "settings"), CASES)
def test_recorded_steps_write_the_same(
    block: int | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, mask) = tiny("llama", block=block), ragged([3, 11, 8, 7])
    given = {"attention_mask": mask, "max_new_tokens": 40, "seed": 2, **settings}
    expected = generate(monkeypatch, True, model, ids, **given)
    assert model.graph_replays == 0
    record_on_a_cpu(monkeypatch)
    monkeypatch.setattr(lockstep, "_SHORTEST", 16)
    got = generate(monkeypatch, True, model, ids, **given)
    assert torch.equal(expected.sequences, got.sequences)
    assert expected.forwards == got.forwards
    # A step is recorded when it is run for the third time.
    assert model.graph_replays > 0 or got.forwards <= 8
    model.record_graphs = False
    generate(monkeypatch, True, model, ids, **given)
    assert model.graph_replays == 0


@pytest.mark.parametrize("block", [None, 4])
def test_recorded_steps_of_rows_that_leave(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", block=block)
    ids = torch.cat([prompt(6, seed=seed) for seed in range(5)])
    free = model.generate(ids, max_new_tokens=60, eos_token_id=None)[:, 6:]
    given = {"max_new_tokens": 60, "eos_token_id": [int(free[row, 1]) for row in range(3)]}
    expected = generate(monkeypatch, False, model, ids, **given)
    record_on_a_cpu(monkeypatch)
    got = generate(monkeypatch, True, model, ids, **given)
    assert torch.equal(expected.sequences, got.sequences)
    assert model.graph_replays > 0


def test_a_model_that_cannot_be_recorded_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    expected = generate(monkeypatch, False, model, ids)
    record_on_a_cpu(monkeypatch)
    layer, calls = model.model.norm, []
    forward = layer.forward

    def asks(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(float(hidden.sum()))
        return forward(hidden)

    monkeypatch.setattr(layer, "forward", asks)
    got = generate(monkeypatch, True, model, ids)
    assert torch.equal(expected.sequences, got.sequences)
    assert model.graph_replays == 0


@pytest.mark.parametrize(
    ("fields", "starts", "counts"),
    [
        ({"block_size": 4}, [(0, 8), (4, 12), (8, 16), (12, 20)], [(1, 3), (4, 4), (4, 4), (4, 4)]),
        (
            {"block_size": 4, "sub_block_size": 3},
            [(0, 8), (0, 8), (4, 12), (4, 12), (8, 16), (8, 16), (12, 20), (12, 20)],
            [(0, 2), (1, 1), (3, 3), (1, 1), (3, 3), (1, 1), (3, 3), (1, 1)],
        ),
        ({"block_length": 6}, [(3, 9), (9, 15), (15, 16)], [(6, 6), (6, 6), (1, 1)]),
        ({}, [(3, 9)], [(13, 13)]),
    ],
)
def test_regions(fields: Any, starts: Any, counts: Any) -> None:
    lengths, size = [3, 9], fields.get("block_size", 1)
    limits = [-(-(length + NEW) // size) * size for length in lengths]
    index = torch.arange(max(limits))
    masked = torch.stack(
        [(index >= length) & (index < limit) for length, limit in zip(lengths, limits, strict=True)]
    )
    _, regions = plan_regions(masked, lengths, limits, options(**fields))
    assert [region.counts for region in regions] == counts
    assert [region.starts for region in regions] == starts


@pytest.mark.parametrize(
    ("counts", "fields", "steps"),
    [
        ((2, 3), {}, [[1, 1], [1, 1], [0, 1]]),
        ((5, 3), {"max_denoising_steps": 2}, [[3, 2], [2, 1]]),
        ((0, 0), {}, []),
        ((2, 3), {"confidence_threshold": 0.5}, [[2, 3], [1, 2], [1, 1]]),
        ((5, 3), {"confidence_threshold": 0.5, "max_denoising_steps": 2}, [[2, 2], [1, 1]]),
    ],
)
def test_steps(counts: Any, fields: Any, steps: Any) -> None:
    assert plan_steps(counts, options(**fields)) == steps


def test_the_host_looks_seldom_and_runs_little_for_nothing() -> None:
    recent: deque[int] = deque(maxlen=4)
    looks = nothing = 0
    for steps in [8, 8, 7, 9, 8, 5, 8, 8] * 3:
        pace, closed = Pace(recent, 32), torch.zeros(1, 32, dtype=torch.bool)
        for step in range(1, 33):
            closed[0, : -(-32 * step // steps)] = True
            looked = pace.looked
            done = pace.is_written(closed)
            looks += pace.looked != looked
            if done:
                nothing += step - steps
                break
        assert done
    assert looks < 24 * 4
    assert nothing <= 24 * 0.25


def test_layers_on_several_devices_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    record_on_a_cpu(monkeypatch)
    generate(monkeypatch, True, model, ids)
    assert model.graph_replays > 0
    model.somewhere_else = torch.nn.Parameter(torch.zeros(1, device="meta"))
    generate(monkeypatch, True, model, ids)
    assert model.graph_replays == 0
