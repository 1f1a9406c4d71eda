"""Exports to engines: what is refused, what is written, and that it is the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.errors import DataError, IncompatibleError, RequestError
from dllm_convert.planning.layouts.registry import TARGETS, reachable
from dllm_convert.serving import dangers, run
from dllm_convert.serving.run import export, read_converted
from dllm_convert.serving.writing import prove

Make = Callable[..., Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TAKES = {"sdar": ("qwen3",), "llada2": FAMILIES, "a2d": ("llama", "qwen2", "qwen3")}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["sdar", "llada2"])
def test_every_row_of_the_model_is_in_the_export(
    target: str, family: str, tied: bool, converted: Make
) -> None:
    folder = converted(family, tied=tied)
    if family not in TAKES[target]:
        with pytest.raises(IncompatibleError, match=f"it is {family}"):
            export(folder, target)
        return
    made = export(folder, target)
    old, new = weights_of(folder), weights_of(made.path)
    config = json.loads((made.path / "config.json").read_text())
    mask, rows = config["mask_token_id"], config["vocab_size"]
    before = json.loads((folder / "config.json").read_text())["mask_token_id"]
    embedding = new[
        "model.word_embeddings.weight" if target == "llada2" else "model.embed_tokens.weight"
    ]
    source = old["model.embed_tokens.weight"]
    assert embedding.shape[0] == rows
    assert torch.equal(embedding[mask], source[before])
    assert torch.equal(embedding[: len(source)], source)
    # A head that is written can predict neither the mask nor what is no token.
    head = new["lm_head.weight"]
    tokens = read_converted(folder)[0].tokens
    own = old.get("lm_head.weight", source)
    kept = [row for row in range(tokens) if row != before]
    assert torch.equal(head[kept], own[kept])
    assert not config["tie_word_embeddings"]
    rest = {
        name: value for name, value in old.items() if "embed" not in name and "lm_head" not in name
    }
    count = 2
    for name, value in rest.items():
        if target == "sdar" or "_proj" not in name or "mlp" in name:
            renamed = (
                name
                if target == "sdar"
                else (
                    name.replace("self_attn.q_norm", "attention.query_layernorm").replace(
                        "self_attn.k_norm", "attention.key_layernorm"
                    )
                )
            )
            assert torch.equal(new[renamed], value), name
            count += 1
        elif ".q_proj." in name:
            parts = [old[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            stacked = name.replace("self_attn.q_proj", "attention.query_key_value")
            assert torch.equal(new[stacked], torch.cat(parts)), name
            count += 1
        elif ".o_proj." in name:
            assert torch.equal(new[name.replace("self_attn.o_proj", "attention.dense")], value)
            count += 1
    assert len(new) == count
    # Engines and transformers before 5 read the flat field alone; null beside it erases the other.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "rope_scaling" not in config
    record = json.loads((made.path / run.RECORD).read_text())
    assert record["target"] == target
    assert set(record["files"]) == {p.name for p in made.path.iterdir()} - {run.RECORD}


@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
@pytest.mark.parametrize("shift", ["keep", "drop"])
@pytest.mark.parametrize("family", TAKES["a2d"])
def test_dllm_reads_the_same_file_under_a_config_of_its_own(
    family: str, shift: str, target: str, converted: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("MASK_BOUND", "ROWS_BOUND"):  # nobody trained this one
        monkeypatch.setattr(dangers, bound, 1.0)
    folder = converted(family, tied=True, target=target, token_shift=shift)
    made = export(folder, "a2d")
    assert dict(made.ways) == {"model.safetensors": "linked"} or "shared" in made.ways.values()
    config = json.loads((made.path / "config.json").read_text())
    assert config["model_type"] == f"a2d-{family}"
    assert not {"auto_map", "is_causal", "diffusion"} & config.keys()
    assert f"right_shift_logits={shift == 'keep'}" in made.launch[0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_shift": "keep"}, "reads logits at the token's own"),
        ({"target": "mdlm"}, "decodes block by block"),
        (
            {"noise": {"kernel": "uniform", "discrete_steps": 8}},
            "only fill masks in",
        ),
    ],
)
@pytest.mark.parametrize("target", ["sdar", "llada2"])
def test_what_an_engine_would_read_wrong_is_refused_before_anything_is_written(
    target: str, fields: dict[str, Any], reason: str, converted: Make
) -> None:
    folder = converted("qwen3", **fields)
    before = sorted(folder.parent.iterdir())
    with pytest.raises(IncompatibleError, match=reason) as caught:
        export(folder, target)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert sorted(folder.parent.iterdir()) == before


def test_a_rope_that_engines_ignore_is_refused(converted: Make) -> None:
    folder = converted("llama")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match="type llama3, which the engine ignores"):
        export(folder, "llada2")


def test_biases_that_engines_do_not_add_are_refused(tmp_path: Path, source_cache: Any) -> None:
    source = source_cache("llama", attention_bias=True)
    convert(source, tmp_path / "a", "bd3lm", block=4, token_shift="drop")
    with pytest.raises(IncompatibleError, match=r"o_proj\.bias"):
        export(tmp_path / "a", "llada2")


def test_a_likely_mask_is_refused_where_the_head_is_the_embedding(
    tmp_path: Path, source_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source_cache("llama", tied=True), tmp_path / "a", "bd3lm", block=4)
    monkeypatch.setattr(dangers, "MASK_BOUND", 1e-9)
    with pytest.raises(IncompatibleError, match="the mask itself a probability of") as caught:
        export(tmp_path / "a", "a2d")
    assert "tied to the embedding" in str(caught.value)


def test_names_folders_and_files_that_are_not_there(converted: Make, tmp_path: Path) -> None:
    folder = converted("qwen3")
    with pytest.raises(RequestError, match="did you mean sdar"):
        export(folder, "sdra")
    with pytest.raises(DataError):
        export(tmp_path / "nothing", "sdar")
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("a")
    with pytest.raises(DataError, match="is not empty"):
        export(folder, "sdar", full)
    with pytest.raises(DataError, match="cannot be read as text"):
        export(folder, "sdar", tmp_path / "new", data=tmp_path / "no.txt")
    assert not (tmp_path / "new").exists()


def test_what_can_be_reached_is_known_before(converted: Make) -> None:
    found, _ = read_converted(converted("qwen3"))
    assert {target.name: not why for target, why in reachable(found)} == {
        "sdar": True, "llada2": True, "gguf": True, "gguf-diffusion": False, "nemotron": False,
        "a2d": True,
    }  # fmt: skip
    found, _ = read_converted(converted("mistral", token_shift="keep"))
    reasons = {target.name: len(why) for target, why in reachable(found)}
    assert set(reasons) == set(TARGETS)
    assert [name for name, count in reasons.items() if not count] == ["gguf"]


def test_the_command_and_python_do_the_same(converted: Make, tmp_path: Path) -> None:
    folder = converted("qwen3")
    line = ["export", str(folder), "--to", "sdar", "--out", str(tmp_path / "x"), "--json"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["engines"] == ["SGLang", "LMDeploy"]
    made = dc.export(folder, "sdar", tmp_path / "y")
    for file in (tmp_path / "x").iterdir():
        if file.name != run.RECORD:
            assert (tmp_path / "y" / file.name).read_bytes() == file.read_bytes()
    guide = (made.path / "README.md").read_text()
    assert "sglang.launch_server" in guide
    assert "block_size: 4" in (made.path / "sglang_dllm.yaml").read_text()


LAYER = "model.layers.{}."
STACK = "model.layers.0.attention.query_key_value.weight"
DENSE = "model.layers.0.attention.dense.weight"
WORDS, HEAD, NORM = "model.word_embeddings.weight", "lm_head.weight", "model.norm.weight"
Weights = dict[str, torch.Tensor]
PLANTED: dict[str, Callable[[Weights], Any]] = {
    "one layer shifted": lambda w: _swap(w, "mlp.up_proj.weight"),
    "mask row not moved": lambda w: w[WORDS][156895].zero_(),
    "queries and values swapped": lambda w: w.update({STACK: w[STACK].flip(0)}),
    "a norm of another layer": lambda w: _swap(w, "input_layernorm.weight"),
    "one number": lambda w: w["model.layers.1.mlp.down_proj.weight"][0, 0].add_(1e-3),
    "a tensor missing": lambda w: w.pop(NORM),
    "a tensor too many": lambda w: w.update({"extra": torch.zeros(2)}),
    "another type": lambda w: w.update({NORM: w[NORM].half()}),
    "the mask may be predicted": lambda w: w[HEAD][156895].zero_(),
    "a row past the tokenizer may be predicted": lambda w: w[HEAD][157000].zero_(),
    "a row of the vocabulary lost": lambda w: w[WORDS][7].zero_(),
    "a matrix the other way round": lambda w: w.update({DENSE: w[DENSE].T.contiguous()}),
}


def _swap(weights: Weights, name: str) -> None:
    one, other = (LAYER.format(number) + name for number in (0, 1))
    weights[one], weights[other] = weights[other], weights[one]


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_in_the_bytes_is_found(
    fault: str, converted: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted("llama")
    plain = run.write_pieces

    def faulty(pieces: Any, source: Path, out: Path, headers: Any, advance: Any) -> Any:
        made = plain(pieces, source, out, headers, advance)
        weights = load_file(out / "model.safetensors")
        PLANTED[fault](weights)
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        return made

    monkeypatch.setattr(run, "write_pieces", faulty)
    with pytest.raises(DataError, match="the export is not its source"):
        export(folder, "llada2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_proof_reads_what_is_on_the_disk(converted: Make, tmp_path: Path) -> None:
    folder = converted("llama")
    seen: list[Any] = []
    plain = run.prove

    def kept(*given: Any) -> int:
        seen.append(given)
        return plain(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prove", kept)
        made = export(folder, "llada2", tmp_path / "out")
    pieces, source, _, headers = seen[0]
    total = sum(value.numel() * value.element_size() for value in weights_of(made.path).values())
    assert prove(pieces, source, made.path, headers) == total
