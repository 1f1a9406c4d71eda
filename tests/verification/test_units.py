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

from dllm_convert.behaviour.influence import Pattern
from dllm_convert.common.tables import text_of
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.errors import DataError, IncompatibleError, UnsupportedError
from dllm_convert.modeling.converted_config import read_section
from dllm_convert.modeling.published.masks import block_causal_mask
from dllm_convert.verification import Probe, VerificationReport, verify_checkpoint
from dllm_convert.verification.catalogue import BEHIND, CATALOGUE, DEVICE, GATED, VERIFIED
from dllm_convert.verification.instruments.divergence import Trace
from dllm_convert.verification.opening import VerificationRequest, opened
from dllm_convert.verification.probes.gradient import measure_gradient
from dllm_convert.verification.probes.influence import first_wrong, probe_columns, probe_length
from dllm_convert.verification.report import at_most, first_items, largest, none_wrong, skipped
from dllm_convert.verification.shown import verification_blocks
from dllm_convert.verification.subject import claimed_mask

ROOT = Path(__file__).parents[2]
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
    assert draw(claimed_mask(read_section({"diffusion": SECTION}), 5)) == [
        "##...",
        "##...",
        "####.",
        "####.",
        "#####",
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_claimed_mask_agrees_with_the_mask_in_use(size: int) -> None:
    claim = read_section({"diffusion": {**SECTION, "block_size": size}})
    positions = torch.arange(16)[None]
    used = block_causal_mask(positions, torch.ones_like(positions).bool(), size, 16)[0, 0]
    assert torch.equal(claimed_mask(claim, 16), used)


def test_claimed_mask_of_mdlm_is_full() -> None:
    section = {**SECTION, "objective": "mdlm", "attention": "bidirectional", "block_size": None}
    assert claimed_mask(read_section({"diffusion": section}), 4).all()


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
        read_section({"diffusion": {**SECTION, **change}})


@pytest.mark.parametrize("key", ["objective", "block_size", "mask_token_id", "attention"])
def test_claim_that_is_incomplete(key: str) -> None:
    section = {name: value for name, value in SECTION.items() if name != key}
    with pytest.raises(IncompatibleError, match=key):
        read_section({"diffusion": section})


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


def test_a_wrong_pair_is_told_with_the_claim() -> None:
    allowed = torch.tensor([[True, False], [True, True]])
    for at, said in (
        ((0, 1), "0 sees token 4, and should not"),
        ((1, 0), "1 does not see token 3, and should"),
    ):
        moved = allowed.float()
        moved[at] = 1 - moved[at]
        assert first_wrong(Pattern(moved, allowed, 0.1, [3, 4])) == f"position {said}"
    assert first_wrong(Pattern(allowed.float(), allowed, 0.1, [3, 4])) == ""


def test_not_a_number_fails_a_limit() -> None:
    assert at_most("x", "differ by", math.nan, 1.0).passed is False
    assert largest([torch.tensor([0.0, math.nan])]) == math.inf
    assert largest([torch.tensor([-3.0, 2.0]), torch.zeros(0)]) == 3.0


@pytest.mark.parametrize("nothing", [[], [torch.zeros(0)], [torch.zeros(0), torch.zeros(3, 0)]])
def test_what_compared_nothing_does_not_pass(nothing: list[torch.Tensor]) -> None:
    assert math.isnan(largest(nothing))
    probe = at_most("x", "differ by", largest(nothing), 1.0)
    assert (probe.passed, probe.measured) == (False, "nothing was compared")


def test_of_nothing_none_is_wrong_and_that_is_not_enough() -> None:
    assert [none_wrong(*pair) for pair in ((0, 3), (1, 3), (0, 0))] == [True, False, False]


@pytest.mark.parametrize("probes", [(), (skipped("a", "1", "no base"),)])
def test_a_report_of_nothing_has_not_passed(probes: tuple[Probe, ...]) -> None:
    assert not VerificationReport(probes, 1.0).passed


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
        "groups": {},
    }


def test_the_table_says_why_a_probe_failed_and_why_one_did_not_run() -> None:
    bad = Probe("b", False, "2", "1", "row 3 is wrong", "a mask is exact")
    report = VerificationReport(
        (Probe("a", True, "1", "1"), bad, skipped("c", "1", "no base")), 2.0
    )
    lines = text_of(verification_blocks(report.as_dict())).splitlines()
    assert lines[2:5] == [
        "FAILED   b      2         1",
        f"{'':9}row 3 is wrong",
        f"{'':9}a mask is exact",
    ]
    assert lines[5].split() == ["skipped", "c", "no", "base"]
    assert lines[-1] == "1 of 3 probes passed, 1 failed, 1 not run in 2 s"


def test_every_probe_is_documented_with_its_origin() -> None:
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    rows = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    rows = rows.replace("`-", "`attention-")
    documented = {**CATALOGUE, **VERIFIED, **GATED, **BEHIND, **DEVICE}
    assert [name for name in documented if f"`{name}`" not in rows] == []
    assert all(entry.asks.endswith("?") or "same" in entry.asks for entry in documented.values())
    assert all(entry.origin for entry in documented.values())


def test_a_gradient_of_a_causal_sum() -> None:
    embedding = torch.nn.Embedding(8, 4)

    class Sum(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Module:
            return embedding

        def forward(self, *, inputs_embeds: Any, logits_at: Any, use_cache: bool) -> Any:
            del use_cache
            return SimpleNamespace(logits=inputs_embeds.cumsum(1).flatten(0, 1)[logits_at])

    found = measure_gradient(Sum(), embedding(torch.arange(6)).detach(), [0, 3, 5])
    assert draw(found > 0) == ["#.....", "####..", "######"]


def test_two_models_and_the_first_module_that_differs() -> None:
    def model(scale: float) -> Any:
        class Toy(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = torch.nn.Linear(2, 2, bias=False)
                self.second = torch.nn.Linear(2, 2, bias=False)
                self.head = torch.nn.Linear(2, 2, bias=False)
                for module in (self.first, self.second, self.head):
                    torch.nn.init.ones_(module.weight)
                self.second.weight.data.mul_(scale)

            def forward(self, x: torch.Tensor) -> Any:
                return SimpleNamespace(logits=self.head(self.second(self.first(x))))

        return Toy()

    base, inputs = model(1.0), {"x": torch.ones(1, 2)}
    trace = Trace(base, inputs, base.head)
    assert trace.compare(model(1.0), inputs)[1:] == (0, "")
    assert trace.compare(model(1.5), inputs)[1:] == (1, "second differs by 2")
    assert len(trace) == 3


@pytest.mark.parametrize(
    ("version", "older"),
    [("5.2.0", "5.1.9"), ("6.0.0", "5.99.9"), ("5.2.0.dev0", "5.1.9"), ("None", "5.1.9")],
)
def test_a_release_before_the_minimum(version: str, older: str) -> None:
    source = (ROOT / "dllm_convert" / "verification/probes/_fresh_process.py").read_text(
        encoding="utf-8"
    )
    function = source[source.index("def _older") :].split("\n\n\n")[0]
    names: dict[str, Any] = {}
    exec(function, names)
    assert names["_older"](version) == older


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
    from dllm_convert.verification.probes.portability import _environment

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment = _environment(tmp_path)
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & environment.keys()
    assert environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ({}, Schedule()),
        ({"noise_schedule": "cosine"}, Schedule("cosine")),
        ({"noise_schedule": "polynomial", "noise_power": 3.0}, Schedule("polynomial", 3.0)),
        ({"noise_kernel": "uniform", "discrete_steps": 9}, Schedule(discrete_steps=9)),
    ],
)
def test_a_checkpoint_is_measured_on_its_own_schedule(
    converted: Callable[..., Any], added: dict[str, Any], expected: Schedule
) -> None:
    folder = converted("llama", "bd3lm").folder
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"] |= added
    (folder / "config.json").write_text(json.dumps(config))
    with opened(folder, VerificationRequest(None)) as subject:
        objective = subject.objective
    assert objective.schedule == expected
    loaded = SimpleNamespace(diffusion=config["diffusion"], vocab_size=config["vocab_size"])
    assert objective == Objective.from_config(loaded)
