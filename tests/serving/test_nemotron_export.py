"""Nemotron-Labs-Diffusion's layout: who it takes, and that mlx-vlm's own code reads the same."""

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

from dllm_convert.errors import IncompatibleError, VerificationError
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.planning.layouts.registry import reachable
from dllm_convert.serving import run
from dllm_convert.serving.engines import MLX_VLM
from dllm_convert.serving.nemotron_rule import write_causal
from dllm_convert.serving.run import export, read_converted

Make = Callable[..., Path]
CAUSAL = {"training": {"method": "none", "ar_loss_weight": 1.0}}
LONG = {"factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {**LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": LONG,
}
ENGINE = pytest.mark.skipif(
    not MLX_VLM.installed, reason="mlx-vlm is not installed: make test-serving fetches it"
)


def rope(kind: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_tensor_has_the_name_that_engines_read(
    family: str, tied: bool, converted: Make
) -> None:
    folder = converted(family, tied=tied, **CAUSAL)
    made = export(folder, "nemotron")
    old, new = (load_file(place / "model.safetensors") for place in (folder, made.path))
    body = {f"encoder.{name[6:]}" for name in old if name.startswith("model.")}
    assert set(new) == body | {"diffusion_head.weight"}
    for name in body:
        assert torch.equal(new[name], old[f"model.{name[8:]}"])
    config = json.loads((made.path / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    mask = config["mask_token_id"]
    own = old.get("lm_head.weight", old["model.embed_tokens.weight"])
    kept = [row for row in range(read_converted(folder)[0].tokens) if row != mask]
    assert torch.equal(new["diffusion_head.weight"][kept], own[kept])
    assert not torch.equal(new["diffusion_head.weight"][mask], own[mask])


def test_the_next_token_is_never_the_mask_either(converted: Make) -> None:
    folder = converted("llama", **CAUSAL)
    head = load_file(export(folder, "nemotron").path / "model.safetensors")["diffusion_head.weight"]
    loaded = load_checkpoint(folder, device="cpu", dtype="float32")
    ids = torch.tensor([loaded.tokenizer("A list is what stands in brackets.")["input_ids"]])
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        output = loaded.model(input_ids=ids, attention_mask=causal, output_hidden_states=True)
    logits = output.hidden_states[-1][0] @ head.T  # (length, rows)
    best = logits.max(-1).values
    assert float((logits[:, loaded.model.config.mask_token_id] - best).max()) < -20


@pytest.mark.parametrize(
    ("family", "source", "fields", "reason"),
    [
        ("qwen3", {}, CAUSAL, "it is qwen3"),
        ("qwen2", {}, CAUSAL, "it is qwen2"),
        ("llama", {}, {}, "see all of their own block"),
        ("llama", {}, {**CAUSAL, "token_shift": "keep"}, "at the token's own"),
        ("llama", {"attention_bias": True}, CAUSAL, r"biases \(q_proj.bias, o_proj.bias\)"),
        ("llama", {"mlp_bias": True}, CAUSAL, r"biases \(up_proj.bias\)"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            CAUSAL,
            "of type dynamic",
        ),
    ],
)
def test_what_engines_would_read_wrong_is_refused(
    family: str, source: dict[str, Any], fields: dict[str, Any], reason: str, converted: Make
) -> None:
    folder = converted(family, source=source, **fields)
    with pytest.raises(IncompatibleError, match=reason) as caught:
        export(folder, "nemotron")
    assert caught.value.hint


def test_a_causal_context_is_for_no_engine_that_reads_blocks_open(converted: Make) -> None:
    found, _ = read_converted(converted("llama", **CAUSAL))
    reasons = {target.name: [one.reason for one in why] for target, why in reachable(found)}
    assert not reasons.pop("nemotron")
    for name, said in reasons.items():
        if name in ("sdar", "llada2", "a2d"):
            assert any("strictly causally (ar_loss_weight)" in one for one in said), name


def test_the_rule_writes_the_next_token_first_and_never_the_mask(converted: Make) -> None:
    loaded = load_checkpoint(converted("llama", **CAUSAL), device="cpu", dtype="float32")
    model, prompt = loaded.model, [5, 6, 7, 8, 9]
    text = write_causal(model, prompt, 10, 4, 0.9)
    assert len(text) == 10
    assert model.config.mask_token_id not in text
    # Blocks of one token are autoregression: every token follows from a strictly causal forward.
    text = write_causal(model, prompt, 6, 1, 1.0)
    ids = torch.tensor([[*prompt, *text]])
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    logits = model(input_ids=ids, attention_mask=causal).logits[0, 4:-1]
    logits[:, model.config.mask_token_id] = -torch.inf
    assert text == logits.argmax(-1).tolist()


@ENGINE
@pytest.mark.usefixtures("shared_engines")
@pytest.mark.parametrize(
    ("family", "kind", "tied"),
    [
        ("llama", "default", False),
        ("mistral", "default", True),
        *(("llama", kind, True) for kind in ROPES if kind != "default"),
    ],
)
def test_mlx_vlm_computes_and_writes_what_we_do(
    family: str, kind: str, tied: bool, converted: Make
) -> None:
    folder = converted(family, tied=tied, source=rope(kind), **CAUSAL)
    made = export(folder, "nemotron", proven=True)
    (said,) = [found for what, found in made.checked.items() if "mlx-vlm" in what]
    assert "189 of 189 decoded tokens equal" in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("nemotron")
    source = make_source(place / "source", "llama", tied=False, **rope("llama3"))
    return convert_leaning(source, place / "converted", **CAUSAL)


FAULTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], Any] | None]] = {
    "rope that is not scaled": ({"rope_parameters": {"rope_type": "default"}}, None),
    "wrong eps": ({"rms_norm_eps": 0.5}, None),
    "another mask": ({"mask_token_id": 12}, None),
    "other blocks": ({"block_size": 2}, None),
    "the head of another model": ({}, lambda w: w["diffusion_head.weight"].mul_(1.01)),
    "a layer of another place": (
        {},
        lambda w: w["encoder.layers.0.mlp.up_proj.weight"].copy_(
            w["encoder.layers.1.mlp.up_proj.weight"]
        ),
    ),
}


@ENGINE
@pytest.mark.usefixtures("shared_engines")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_engine(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, of_weights = FAULTS[fault]
    plain = run.write_config

    def faulty(path: Path, value: dict[str, Any]) -> None:
        plain(path, value | fields if path.name == "config.json" else value)

    def unproven(pieces: Any, source: Path, out: Path, headers: Any) -> int:
        if of_weights is not None:
            weights = load_file(out / "model.safetensors")
            of_weights(weights)
            save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        return 0

    monkeypatch.setattr(run, "write_config", faulty)
    monkeypatch.setattr(run, "prove", unproven)
    with pytest.raises(VerificationError, match="reads another model"):
        export(folder, "nemotron", tmp_path / "out", proven=True)
