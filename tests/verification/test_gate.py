"""Code of a folder runs unasked only if this package wrote it, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign_cases import edit_json

from dllm_convert.adapters import get_adapter
from dllm_convert.errors import DataError
from dllm_convert.modeling.bundle import CODE_FILES
from dllm_convert.source.tokenizer_loading import TokenizerErrors, load_tokenizer
from dllm_convert.verification import verify_checkpoint
from dllm_convert.verification.probes.gate import strange_code


def reason(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text())
    return strange_code(folder, config, get_adapter(config["model_type"]))


def add_side_effect(folder: Path, name: str) -> Path:
    marker = folder.parent / "ran"
    path = folder / name
    touch = f"\nfrom pathlib import Path\nPath({str(marker)!r}).touch()\n"
    path.write_text(path.read_text() + touch)
    return marker


def test_own_output_needs_no_consent(converted: Callable[..., Any]) -> None:
    for family, target in (("llama", "bd3lm"), ("bert", "mdlm")):
        assert reason(converted(family, target).folder) is None


@pytest.mark.parametrize("name", CODE_FILES)
def test_changed_file_sleeps_until_it_is_trusted(converted: Callable[..., Any], name: str) -> None:
    folder = converted("llama", "bd3lm").folder
    marker = add_side_effect(folder, name)

    report = verify_checkpoint(folder, groups=["files", "tokens", "portability"])

    probes = {probe.name: probe for probe in report.probes}
    assert not marker.exists()
    assert probes["portable"].passed is None
    assert f"{name} is not the file" in probes["portable"].detail
    assert "--trust-remote-code" in probes["portable"].detail
    assert probes["portable-stock"].passed

    report = verify_checkpoint(
        folder, groups=["files", "tokens", "portability"], trust_remote_code=True
    )

    assert marker.exists()
    assert {probe.name: probe for probe in report.probes}["portable"].passed


@pytest.mark.parametrize(
    "change",
    [
        {"AutoConfig": "evil.Config"},
        {"AutoModelForCausalLM": "evil.Model"},
        {"AutoModelForCausalLM": "someone/else--modeling_dllm.DiffusionLlamaForCausalLM"},
    ],
)
def test_auto_map_that_names_other_code(
    converted: Callable[..., Any], change: dict[str, str]
) -> None:
    folder = converted("llama", "mdlm").folder
    edit_json(folder / "config.json", lambda config: config["auto_map"].update(change))
    assert "auto_map" in str(reason(folder))


@pytest.mark.parametrize("name", ["custom_generate/generate.py", "adapter_config.json"])
def test_what_else_would_run(converted: Callable[..., Any], name: str) -> None:
    folder = converted("llama", "mdlm").folder
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert Path(name).parts[0] in str(reason(folder))


# The tokenizer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"model": {"type": "BPE", "vocab": 3}}', '{"version": "1.0", "model": null}'],
)
def test_broken_tokenizer_is_a_known_error(converted: Callable[..., Any], content: str) -> None:
    folder = converted("llama", "mdlm").folder
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_errors_of_ours_are_not_swallowed() -> None:
    for error in (RuntimeError("a bug"), AssertionError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), TokenizerErrors():
            raise error
    with pytest.raises(DataError, match="from Rust"), TokenizerErrors():
        raise Exception("from Rust")
    panic = type("PanicException", (BaseException,), {})("it panicked")
    with pytest.raises(DataError, match="it panicked"), TokenizerErrors():
        raise panic
