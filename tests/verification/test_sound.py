"""Sound checkpoints of every family pass every probe."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dllm_convert.common.manifest import hash_files, write_manifest
from dllm_convert.verification import GROUPS, VerificationReport, verify_checkpoint
from dllm_convert.verification.catalogue import CATALOGUE

SOUND = [
    ("bert", "mdlm"),
    ("roberta", "mdlm"),
    *(
        (family, target)
        for family in ("llama", "qwen2", "qwen3", "mistral")
        for target in ("mdlm", "bd3lm")
    ),
]
IN_PROCESS = [group for group in GROUPS if group != "portability"]
NOT_OF_ALL = {
    *("hashes", "portable", "portable-stock", "portable-version"),
    *("chat-template", "cache", "cache-clean", "block-one", "quality", "token-shift"),
}
"""Probes that need a fresh process, a manifest, a training, or that some checkpoints have not."""
ALWAYS_RUN = set(CATALOGUE) - NOT_OF_ALL


def complaints(report: VerificationReport) -> list[str]:
    return [f"{p.name}: {p.measured}; required {p.required}; {p.detail}" for p in report.failed]


@pytest.mark.parametrize(("family", "target"), SOUND)
def test_untrained_conversion_passes_every_probe(
    converted: Callable[..., Any], family: str, target: str
) -> None:
    made = converted(family, target)
    write_manifest(made.folder, {"format_version": 1, "files": hash_files(made.folder)})

    report = verify_checkpoint(made.folder, against=made.base, untrained=True)

    assert complaints(report) == []
    assert report.passed
    passed = {probe.name for probe in report.probes if probe.passed}
    expected = ALWAYS_RUN | {"hashes", "portable", "portable-stock", "portable-version"}
    expected |= {"cache", "cache-clean"} if target == "bd3lm" else set()
    expected |= {"block-one"} if family not in ("bert", "roberta") else set()
    expected |= {"chat-template"} if family == "llama" else set()
    assert passed == expected
    assert [probe.name for probe in report.probes] == list(CATALOGUE)
    assert all(probe.origin == CATALOGUE[probe.name].origin for probe in report.probes)
    assert set(report.groups) == set(GROUPS) - {"device", "gated", "behind", "lossless"}
    assert all(probe.detail for probe in report.probes if probe.passed is None)
    json.dumps(report.as_dict())


@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("llama", "bd3lm", {"tied": True}),
        ("llama", "bd3lm", {"shards": 3, "dtype": torch.bfloat16}),
        ("llama", "mdlm", {"dtype": torch.float16}),
        ("llama", "bd3lm", {"block": 1}),
        ("llama", "bd3lm", {"block": 3, "layers": 3}),
        ("llama", "bd3lm", {"block": 32}),
        ("mistral", "bd3lm", {"dtype": torch.bfloat16, "tied": True}),
        ("qwen3", "mdlm", {"dtype": torch.bfloat16, "tied": True, "shards": 2}),
        ("qwen3", "bd3lm", {"dtype": torch.float16, "tied": True}),
        ("bert", "mdlm", {"dtype": torch.bfloat16}),
        ("qwen2", "bd3lm", {"vocab_padding": 37}),
        (
            "qwen2",
            "mdlm",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        ),
        ("mistral", "bd3lm", {"sliding_window": 4}),
        ("mistral", "mdlm", {"sliding_window": 4}),
        ("bert", "mdlm", {"tied": False}),
        ("roberta", "mdlm", {"shards": 2}),
    ],
    ids=str,
)
def test_variants_raise_no_false_alarm(
    converted: Callable[..., Any], family: str, target: str, options: dict[str, Any]
) -> None:
    made = converted(family, target, **options)

    report = verify_checkpoint(made.folder, against=made.base, untrained=True, groups=IN_PROCESS)

    assert complaints(report) == []
    assert {probe.name for probe in report.probes if probe.passed} >= ALWAYS_RUN


@pytest.mark.stranger
def test_trained_weights_are_compared_by_shape_and_by_their_bound(
    converted: Callable[..., Any],
) -> None:
    made = converted("llama", "bd3lm")
    quality = {
        "nelbo_before": {"nats_per_token": 8.0, "stderr": 0.2},
        "nelbo_after": {"nats_per_token": 5.5, "stderr": 0.1},
        "ar_nll": {"nats_per_token": 3.25, "stderr": 0.1},
    }
    listed = {"format_version": 1, "files": hash_files(made.folder)}
    write_manifest(made.folder, {**listed, "recipe": {"token_shift": "keep"}})

    report = verify_checkpoint(
        made.folder,
        against=made.base,
        quality=quality,
        untrained=False,
        groups=["files", "base", "quality", "likelihood"],
    )

    probes = {probe.name: probe for probe in report.probes}
    assert complaints(report) == []
    assert probes["base-tensors"].passed is True
    assert probes["base-logits"].passed is None
    assert probes["quality"].passed is True
    assert probes["quality"].measured == "held-out NELBO 5.5 ± 0.2 nats per token"
    assert "3.25 ± 0.2" in probes["quality"].detail
    assert probes["token-shift"].passed is True
    assert probes["attention"].passed is None


def test_facts_come_from_the_manifest_when_the_caller_gives_none(
    converted: Callable[..., Any],
) -> None:
    made = converted("llama", "mdlm")
    measurements = {
        "nelbo_before": {"nats_per_token": 8.0},
        "nelbo_after": {"nats_per_token": 5.5},
    }
    write_manifest(
        made.folder,
        {"recipe": {"training": {"method": "full"}}, "measurements": measurements},
    )

    report = verify_checkpoint(made.folder, groups=["quality"])

    assert [probe.passed for probe in report.probes if probe.name == "quality"] == [True]


def test_rounding_of_huge_activations_is_no_failure(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dllm_convert.verification.probes import invariance

    made = converted("llama", "mdlm")
    real = invariance._padded

    def noisy(subject: Any, side: str, texts: list[Any]) -> float:
        rounding = 1e-2 if subject.model.dtype == torch.float32 else 0.0
        return real(subject, side, texts) + rounding

    monkeypatch.setattr(invariance, "_padded", noisy)
    report = verify_checkpoint(made.folder, untrained=True, groups=["files", "padding"])

    assert complaints(report) == []
    padding = next(probe for probe in report.probes if probe.name == "padding-left")
    assert "float64" in padding.detail
