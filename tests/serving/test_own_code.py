"""Engines' own code reads what is exported, and does not take what is broken for the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert_leaning
from factory import make_source
from safetensors.torch import load_file, save_file

from dllm_convert.errors import VerificationError
from dllm_convert.serving import proof, run
from dllm_convert.serving.engines import LMDEPLOY, MLX_VLM, SGLANG, EngineCode
from dllm_convert.serving.run import export

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("shared_engines")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WORDS = "54 of 54 decoded tokens equal"


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write what a large model writes: a vocabulary of 157,184 rows is most of the work here."""
    monkeypatch.setattr(proof, "_NEW_TOKENS", proof._FEW)


def needs(code: EngineCode) -> Any:
    return pytest.mark.skipif(
        not code.installed, reason=f"{code.name} is not installed: make test-serving fetches it"
    )


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[EngineCode], None]:
    """Return what leaves one engine to prove by."""

    def leave(code: EngineCode) -> None:
        monkeypatch.setattr(run, "engines_of", lambda target: (code,))

    return leave


# The head of a tied model is written where the family is llama: the layouts treat all alike.
CASES = [
    *(("llada2", family, code, False) for family in FAMILIES for code in (SGLANG, MLX_VLM)),
    ("llada2", "llama", SGLANG, True),
    *(("sdar", "qwen3", SGLANG, tied) for tied in (False, True)),
    ("sdar", "qwen3", LMDEPLOY, True),
]


@pytest.mark.parametrize(
    ("target", "family", "code", "tied"),
    [
        pytest.param(*case, marks=needs(case[2]), id="-".join(map(str, (*case[:2], case[2].name))))
        for case in CASES
    ],
)
def test_an_engine_computes_and_writes_what_we_do(
    target: str, family: str, code: EngineCode, tied: bool, converted: Make, only: Any
) -> None:
    only(code)
    made = export(converted(family, tied=tied), target, proven=True)
    (said,) = [found for what, found in made.checked.items() if code.name in what]
    assert (WORDS in said) == code.writes
    record = json.loads((made.path / run.RECORD).read_text())["proofs"]
    assert [found["decoded"] for found in record.values()] == [54 * code.writes]


Config, Weights = dict[str, Any], dict[str, torch.Tensor]
STACK = "model.layers.{}.attention.query_key_value.weight"


def _swap(weights: Weights, one: str, other: str) -> None:
    weights[one], weights[other] = weights[other], weights[one]


def _queries_for_keys(weights: Weights) -> None:
    stack = weights[STACK.format(0)]
    keys = stack.shape[0] // 4  # four heads of queries, two of keys, two of values
    weights[STACK.format(0)] = torch.cat(
        [stack[keys : 3 * keys], stack[:keys], stack[3 * keys :]]
    ).contiguous()


def _tied(config: Config) -> None:
    config["tie_word_embeddings"] = True


def _no_head(weights: Weights) -> None:
    del weights["lm_head.weight"]


def _set(**fields: Any) -> Callable[[Config], None]:
    return lambda config: config.update(fields)


def _drop(*names: str) -> Callable[[Config], None]:
    return lambda config: [config.pop(name) for name in names] and None


LAYER = "model.layers.{}.mlp.up_proj.weight"
Fault = tuple[str, EngineCode, Callable[[Config], Any] | None, Callable[[Weights], Any] | None]
REFUSED = {
    "sdar: head tied": "cannot read the export: KeyError: 'lm_head.weight'",
    "sdar: a norm not read": "layers.1.self_attn.q_norm.weight is in no file",
}
"""What an engine says of those that it does not read at all; others it reads as another model."""
FAULTS: dict[str, Fault] = {
    "sdar: head tied": ("sdar", SGLANG, _tied, _no_head),
    "sdar: flat rope missing": ("sdar", SGLANG, _drop("rope_theta", "rope_parameters"), None),
    "sdar: wrong eps": ("sdar", SGLANG, _set(rms_norm_eps=0.5), None),
    "sdar: one layer shifted": (
        "sdar", SGLANG, None, lambda w: _swap(w, LAYER.format(0), LAYER.format(1)),
    ),
    "sdar: mask row not moved": (
        "sdar", SGLANG, None, lambda w: w["model.embed_tokens.weight"][151669].zero_(),
    ),
    "sdar: a norm not read": (
        "sdar", SGLANG, None, lambda w: w.pop("model.layers.1.self_attn.q_norm.weight"),
    ),
    "sdar: wrong eps, LMDeploy": ("sdar", LMDEPLOY, _set(rms_norm_eps=0.5), None),
    "sdar: other blocks, LMDeploy": ("sdar", LMDEPLOY, _set(block_size=2), None),
    "llada2: queries for keys": ("llada2", SGLANG, None, _queries_for_keys),
    "llada2: one layer shifted": (
        "llada2", SGLANG, None, lambda w: _swap(w, STACK.format(0), STACK.format(1)),
    ),
    "llada2: mask row not moved": (
        "llada2", SGLANG, None, lambda w: w["model.word_embeddings.weight"][156895].zero_(),
    ),
    "llada2: queries and keys without their norms": (
        "llada2", SGLANG, _set(use_qk_norm=False), None,
    ),
    "llada2: flat rope missing": (
        "llada2", SGLANG, _drop("rope_theta", "rope_parameters"), None,
    ),
    "llada2: flat rope missing, mlx-vlm": ("llada2", MLX_VLM, _drop("rope_theta"), None),
    "llada2: another mask, mlx-vlm": ("llada2", MLX_VLM, _set(mask_token_id=12), None),
    "llada2: half of the heads turned, mlx-vlm": (
        "llada2", MLX_VLM, _set(partial_rotary_factor=0.5, rotary_dim=4), None,
    ),
    "llada2: other blocks, mlx-vlm": ("llada2", MLX_VLM, _set(block_size=2), None),
}  # fmt: skip
"""Name to layout, the engine that has to see it, and what is done to config and weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a conversion whose rotary embedding is not the one that engines take by default."""
    place = tmp_path_factory.mktemp("fault")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    source = make_source(place / "source", "qwen3", tied=False, rope_parameters=rope)
    return convert_leaning(source, place / "converted")


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=needs(found[1])) for name, found in FAULTS.items()]
)
def test_a_fault_is_found_by_the_engine(
    fault: str, folder: Path, only: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target, code, of_config, of_weights = FAULTS[fault]
    only(code)
    plain = run.write_config

    def faulty(path: Path, value: dict[str, Any]) -> None:
        if path.name == "config.json" and of_config is not None:
            of_config(value)
        plain(path, value)

    def unproven(pieces: Any, source: Path, out: Path, headers: Any) -> int:
        """Break what was written, where the comparison of bytes would see it."""
        if of_weights is not None:
            weights = load_file(out / "model.safetensors")
            of_weights(weights)
            save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        return 0

    monkeypatch.setattr(run, "write_config", faulty)
    monkeypatch.setattr(run, "prove", unproven)
    with pytest.raises(VerificationError) as caught:
        export(folder, target, tmp_path / "out", proven=True)
    assert REFUSED.get(fault, "reads another model: logits differ") in str(caught.value)
    assert not list(tmp_path.glob("out*"))
