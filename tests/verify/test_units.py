"""The parts verification is built from, on cases small enough to check by eye."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_convert.attention import block_causal_mask
from dllm_convert.errors import DataError, IncompatibleError, UnsupportedError
from dllm_convert.verify import Probe, VerificationReport, verify_checkpoint
from dllm_convert.verify.influence import Pattern, measure_influence, probe_columns, probe_length
from dllm_convert.verify.report import at_most, first_items, largest, skipped
from dllm_convert.verify.subject import Claim

SECTION = {
    "objective": "bd3lm",
    "block_size": 2,
    "mask_token_id": 9,
    "attention": "block-causal",
    "token_shift": True,
    "noise_schedule": "linear",
    "format_version": 1,
}


def draw(mask: torch.Tensor) -> list[str]:
    return ["".join("#" if cell else "." for cell in row) for row in mask]


def test_claimed_mask_of_blocks_of_two() -> None:
    assert draw(Claim.from_config({"diffusion": SECTION}).mask(5)) == [
        "##...",
        "##...",
        "####.",
        "####.",
        "#####",
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_claimed_mask_agrees_with_the_mask_in_use(size: int) -> None:
    claim = Claim.from_config({"diffusion": {**SECTION, "block_size": size}})
    positions = torch.arange(16)[None]
    used = block_causal_mask(positions, torch.ones_like(positions).bool(), size, 16)[0, 0]
    assert torch.equal(claim.mask(16), used)


def test_claimed_mask_of_mdlm_is_full() -> None:
    section = {**SECTION, "objective": "mdlm", "attention": "bidirectional", "block_size": None}
    assert Claim.from_config({"diffusion": section}).mask(4).all()


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "ar"},
        {"attention": "bidirectional"},
        {"block_size": None},
        {"block_size": 0},
        {"block_size": True},
        {"block_size": "8"},
        {"mask_token_id": -1},
        {"mask_token_id": None},
        {"objective": "mdlm", "attention": "bidirectional"},
    ],
)
def test_claim_that_contradicts_itself(change: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="diffusion"):
        Claim.from_config({"diffusion": {**SECTION, **change}})


@pytest.mark.parametrize("key", ["objective", "block_size", "mask_token_id", "attention"])
def test_claim_that_is_incomplete(key: str) -> None:
    section = {name: value for name, value in SECTION.items() if name != key}
    with pytest.raises(IncompatibleError, match=key):
        Claim.from_config({"diffusion": section})


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16, 32, 64, 100, 128, 512])
def test_influence_is_measured_across_blocks_and_inside_the_last(size: int) -> None:
    subject: Any = SimpleNamespace(claim=SimpleNamespace(block_size=size), context=4096)
    length = probe_length(subject)
    assert length > size
    assert size == 1 or length % size
    columns = probe_columns(length, size)
    assert {size - 1, size, length - 1} <= set(columns)
    if length <= 40:
        assert columns == list(range(length))


def test_influence_never_exceeds_the_context() -> None:
    subject: Any = SimpleNamespace(claim=SimpleNamespace(block_size=64), context=50)
    assert probe_length(subject) == 50


def test_measured_influence_of_a_causal_sum() -> None:
    def model(tokens: torch.Tensor, *, use_cache: bool) -> Any:
        del use_cache
        return SimpleNamespace(logits=tokens.float().cumsum(1)[..., None])

    tokens = torch.arange(6)
    moved, scale = measure_influence(model, tokens, tokens + 1, [0, 3, 5])
    assert draw(moved > 0) == ["#..", "#..", "#..", "##.", "##.", "###"]
    assert scale == 15


def test_pattern_names_the_first_difference() -> None:
    allowed = torch.tensor([[True, False], [True, True]])
    moved = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    pattern = Pattern(moved, allowed, 0.1, [3, 4])
    assert int(pattern.wrong.sum()) == 2
    assert pattern.first_wrong() == "position 0 sees token 4, and should not"
    assert pattern.worst_forbidden == 0.5
    assert pattern.weakest_allowed == 0.0


def test_not_a_number_is_wrong_in_a_pattern() -> None:
    pattern = Pattern(torch.tensor([[math.nan]]), torch.tensor([[True]]), 0.1, [0])
    assert pattern.wrong.all()


def test_not_a_number_fails_a_limit() -> None:
    assert at_most("x", "differ by", math.nan, 1.0).passed is False
    assert largest([torch.tensor([0.0, math.nan])]) == math.inf
    assert largest([torch.tensor([-3.0, 2.0]), torch.zeros(0)]) == 3.0


def test_report_passes_only_without_a_failure() -> None:
    good, bad = Probe("a", True, "1", "1"), Probe("b", False, "2", "1", "why")
    unknown = skipped("c", "1", "no base")
    assert VerificationReport((good, unknown), 1.0).passed
    report = VerificationReport((good, bad, unknown), 1.0)
    assert not report.passed
    assert report.failed == (bad,)
    assert json.loads(json.dumps(report.as_dict())) == {
        "passed": False,
        "probes": [probe.as_dict() for probe in (good, bad, unknown)],
        "seconds": 1.0,
    }


def test_first_items_says_how_many_more() -> None:
    assert first_items(["a", "b"]) == "a; b"
    assert first_items({"a": "is 1", "b": "is 2", "c": "is 3", "d": "is 4"}).endswith("and 1 more")


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        verify_checkpoint(tmp_path / "nowhere")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        verify_checkpoint(tmp_path)


def test_checkpoint_that_is_no_diffusion_model(source_cache: Callable[..., Path]) -> None:
    with pytest.raises(IncompatibleError, match="diffusion"):
        verify_checkpoint(source_cache("llama"))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"diffusion": SECTION}, IncompatibleError),
        ({"diffusion": SECTION, "model_type": "gpt2"}, UnsupportedError),
        ({"diffusion": {}, "model_type": "llama"}, IncompatibleError),
    ],
)
def test_config_that_cannot_be_verified(
    tmp_path: Path, config: dict[str, Any], error: type[Exception]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error):
        verify_checkpoint(tmp_path)


def test_fresh_process_sees_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dllm_convert.verify.portability import _environment

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment = _environment(tmp_path)
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & environment.keys()
    assert environment["HF_HUB_OFFLINE"] == "1"
