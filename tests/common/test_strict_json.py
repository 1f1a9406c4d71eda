"""What is written as JSON is JSON, and what was not measured has not passed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.common import strict_json
from dllm_convert.common.manifest import read_manifest, write_manifest
from dllm_convert.diffusion.likelihood import Likelihood
from dllm_convert.training.metrics import Metrics
from dllm_convert.verification.observe.observations import Observations
from dllm_convert.verification.probes.outcome import check_quality

SOURCES = Path(strict_json.__file__).parents[1]


def strict(text: str) -> Any:
    """Read JSON as JSON.parse does."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_null(number: float, tmp_path: Path) -> None:
    value = {"a": [number, 1.5, (number,)], "b": {"c": number}, "d": True, "e": 3, "f": "Infinity"}
    expected = {"a": [None, 1.5, [None]], "b": {"c": None}, "d": True, "e": 3, "f": "Infinity"}
    assert strict(strict_json.dumps(value)) == expected
    write_manifest(tmp_path, value)
    assert strict((tmp_path / "dllm_convert.json").read_text()) == expected
    assert read_manifest(tmp_path)["b"] == {"c": None}
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, writes=True)
    metrics.append({"step": 1, "loss": number})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_only_formats_of_others_are_written_otherwise() -> None:
    """Configs and tokenizers are the base's; requests to helpers are read by Python."""
    allowed = {
        "adapters/measured.py",
        "card/text.py",
        "endpoint/generating.py",
        "recipe/typed.py",
        "common/strict_json.py",
        "common/json_files.py",
        "evaluation/tasks/items.py",
        "pipeline/workspace.py",
        "probing/run.py",
        "recipe/fields.py",
        "recipe/loading.py",
        "serving/_engine_process.py",
        "serving/engines.py",
        "serving/gguf_tokens.py",
        "source/chat_turns.py",
        "source/safetensors_header.py",
        "source/tokenizer_files.py",
        "training/data/content.py",
        "training/data/forms.py",
        "training/data/plain_text.py",
        "training/data/streaming.py",
        "verification/foreign/_own_code.py",
        "verification/probes/_fresh_process.py",
        "weights/tokenizer_json.py",
    }
    found = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if re.search(r"(?<!strict_)json\.dumps?\(", path.read_text(encoding="utf-8"))
    }
    assert found <= allowed


def test_one_sequence_has_no_standard_error() -> None:
    assert Likelihood(3.0, math.inf, 20).as_dict()["stderr"] is None
    point = {"rate": 0.5, "nats": 3.0, "stderr": None, "tokens": 9}
    seen = Observations.from_measurements({"mask_rates": {"before": [point]}})
    assert seen.rates_before[0].stderr == math.inf
    assert strict(strict_json.dumps(seen.as_dict()))["mask_rates"]["before"] == [point]


class Subject:
    untrained = False

    def __init__(self, before: Any, after: Any) -> None:
        self.quality = {"nelbo_before": before, "nelbo_after": after}


@pytest.mark.parametrize(
    ("before", "after", "passed", "detail"),
    [
        (
            (8.0, None, 20),
            (5.0, None, 20),
            None,
            "held-out text of 20 tokens, expected at least 64",
        ),
        ((8.0, math.inf, 500), (5.0, math.inf, 500), None, "of 1 sequence has no interval"),
        ((8.0, 0.1, 500), (5.0, None, 500), None, "expected at least 2 sequences"),
        ((8.0, 0.1, 20), (5.0, 0.1, 20), None, "held-out text of 20 tokens"),
        ((8.0, 0.1, 500), (5.0, 0.1, 500), True, "half a 95% interval"),
        ((8.0, 0.1, 500), (8.1, 0.1, 500), False, ""),
        ((8.0, 0.1, 500), (None, None, 500), False, ""),
        ((8.0, 0.1, 500), (math.nan, 0.1, 500), False, ""),
    ],
)
def test_not_measured_is_not_passed(
    before: Any, after: Any, passed: bool | None, detail: str
) -> None:
    def measure(value: Any) -> dict[str, Any]:
        return dict(zip(("nats_per_token", "stderr", "tokens"), value, strict=True))

    (probe,) = check_quality(Subject(measure(before), measure(after)))  # type: ignore[arg-type]
    assert probe.passed is passed
    assert detail in probe.detail
    if passed is None:
        assert probe.measured == "not measured"
