"""The probe `lossless`: sound where a verifier is, and what a fault in decoding does to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from gated import gated_folder
from planting import failed

from dllm_convert.modeling.published import lossless
from dllm_convert.modeling.published.drafting import DraftPolicy, Tree
from dllm_convert.verification.accelerator import Accelerator
from dllm_convert.verification.run import verify_checkpoint

GROUP = ["lossless"]


@pytest.fixture(scope="module")
def gated(source_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossless") / "gated"
    gated_folder(source_cache("llama"), folder)
    return folder


@pytest.fixture(autouse=True)
def _always_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(self: DraftPolicy, available: int, left: int) -> Tree:
        return Tree((4, 2)[:available], 2 + self._ahead, all_groups=True)

    monkeypatch.setattr(DraftPolicy, "choose", choose)


def test_a_gated_model_and_one_trained_to_go_on_pass(
    gated: Path, source_cache: Any, tmp_path: Path
) -> None:
    training = {"ar_loss_weight": 1.0}
    convert(source_cache("qwen2"), tmp_path / "own", "bd3lm", block=8, training=training)
    for folder in (gated, tmp_path / "own"):
        report = verify_checkpoint(folder, groups=GROUP)
        assert [probe.passed for probe in report.probes if probe.name == "lossless"] == [True]


def test_without_a_verifier_nothing_is_asked(source_cache: Any, tmp_path: Path) -> None:
    convert(source_cache("llama"), tmp_path / "open", "bd3lm", block=8)
    probes = verify_checkpoint(tmp_path / "open", groups=GROUP).probes
    assert "lossless" not in {probe.name for probe in probes}


def accepts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = lossless._judge

    def blind(verdict: Any, behind: Any, rows: Any, tree: Any, choice: Any) -> Any:
        said, near, *rest = judge(verdict, behind, rows, tree, choice)
        for row, own in zip(rows, said, strict=True):
            if row.candidates:
                own[0] = row.candidates[0][0]
        return said, near, *rest

    monkeypatch.setattr(lossless, "_judge", blind)


def sees_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Tree.layout

    def open_tree(self: Tree, *, open_drafts: bool) -> Any:
        places, seen = layout(self, open_drafts=open_drafts)
        return places, torch.ones_like(seen)

    monkeypatch.setattr(Tree, "layout", open_tree)


def stands_one_further(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Tree.layout

    def later(self: Tree, *, open_drafts: bool) -> Any:
        places, seen = layout(self, open_drafts=open_drafts)
        return places + 1, seen

    monkeypatch.setattr(Tree, "layout", later)


def keeps_what_was_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = lossless._Reader.keep

    def more(self: Any, rows: Any, paths: Any) -> None:
        keep(self, rows, [[*path, 0] for path in paths])

    monkeypatch.setattr(lossless._Reader, "keep", more)


def acts_on_clean_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    run = lossless._Reader._run

    def noisy(self: Any, tokens: Any, *args: Any) -> Any:
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        return run(self, tokens, *args[:3], everywhere)

    monkeypatch.setattr(lossless._Reader, "_run", noisy)


@pytest.mark.parametrize(
    "fault",
    [accepts_all, sees_siblings, stands_one_further, keeps_what_was_rejected, acts_on_clean_tokens],
)
def test_a_fault_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], gated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert failed(gated, GROUP) == {"lossless"}


THERE = Accelerator("cpu", "bfloat16")


def test_in_the_type_of_a_device_a_sound_model_passes(
    gated: Path, source_cache: Any, tmp_path: Path
) -> None:
    training = {"ar_loss_weight": 1.0}
    convert(source_cache("qwen2"), tmp_path / "own", "bd3lm", block=8, training=training)
    for folder in (gated, tmp_path / "own"):
        for there in (THERE, replace(THERE, dtype="float16")):
            report = verify_checkpoint(folder, groups=["device"], accelerator=there)
            (probe,) = [one for one in report.probes if one.name == "device-lossless"]
            assert probe.passed, probe
            assert probe.origin and str(there) in probe.measured


@pytest.mark.parametrize(
    "fault", [accepts_all, sees_siblings, stands_one_further, acts_on_clean_tokens]
)
def test_a_fault_is_seen_in_the_type_of_a_device(
    fault: Any, gated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = failed(gated, ["device"], accelerator=THERE)
    assert "device-lossless" in found
