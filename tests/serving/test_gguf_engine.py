"""llama.cpp on our GGUF files: it computes our logits, and decoding on it writes our text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from gguf_cases import ENGINE, FAMILIES, LLAMA3, Make, file_of, maker, with_rope
from typer.testing import CliRunner

import dllm_convert as dc
from benchmarks import engines
from dllm_convert.cli.app import app
from dllm_convert.errors import DllmConvertError
from dllm_convert.planning.layouts import gguf as layout
from dllm_convert.serving import dangers, gguf_export, gguf_quantised, gguf_tokens
from dllm_convert.serving.gguf_model import load_gguf
from dllm_convert.serving.gguf_quantised import QUANTISED
from dllm_convert.serving.llama_cpp import LlamaCache
from dllm_convert.serving.run import RECORD, export
from dllm_convert.source.gguf_header import read_gguf_header

pytestmark = ENGINE


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory) -> Make:
    """Return a maker of tiny conversions, each made once."""
    return maker(tmp_path_factory.mktemp("converted"), source_cache)


@pytest.mark.parametrize("shift", ["keep", "drop"])
@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_computes_and_writes_what_we_do(
    family: str, target: str, shift: str, converted: Make, tmp_path: Path
) -> None:
    folder = converted(family, target=target, shift=shift)
    made = export(folder, "gguf", tmp_path / "x", outtype="f32", proven=True)
    said = next(found for what, found in made.checked.items() if what.startswith("by llama.cpp"))
    assert "189 of 189 decoded tokens equal" in said
    record = json.loads((made.path / RECORD).read_text())
    proof = record["proof"]
    assert proof["equal"] == proof["decoded"] == 189
    assert proof["difference"] <= proof["tolerance"]
    assert record["proof"]["difference"] < 1e-4
    assert said in (made.path / "README.md").read_text()


ODD: dict[str, Callable[[Make], Path]] = {
    "biases everywhere": lambda make: make("llama", attention_bias=True, mlp_bias=True),
    "tied": lambda make: make("qwen3", tied=True, vocab_padding=9),
    "one block is the text": lambda make: make("llama", block=32),
    "blocks of one": lambda make: make("qwen2", block=1),
    "blocks of three": lambda make: make("llama", block=3),
    "frequencies of Llama 3": lambda make: with_rope(make("llama"), **LLAMA3),
    "positions pressed together": lambda make: with_rope(
        make("qwen2"), rope_type="linear", factor=4.0
    ),
    "YaRN": lambda make: with_rope(
        make("qwen3", target="mdlm"),
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
    ),
    "a context that was read causally": lambda make: make(
        "llama", recipe={"training": {"method": "none", "ar_loss_weight": 0.5}}
    ),
    "heads of their own width": lambda make: make("mistral", head_dim=20),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_engine_reads_models_that_are_not_the_usual(
    case: str, converted: Make, tmp_path: Path
) -> None:
    made = export(ODD[case](converted), "gguf", tmp_path / "x", outtype="f32", proven=True)
    assert any("189 of 189" in found for found in made.checked.values())


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_engine_says_how_near_fewer_bits_are(outtype: str, converted: Make, tmp_path: Path) -> None:
    made = export(converted("qwen2"), "gguf", tmp_path / "x", outtype=outtype, proven=True)
    proof = json.loads((made.path / RECORD).read_text())["proof"]
    assert 0 < proof["divergence"] <= proof["bound"]
    assert proof["agreement"] > 0.85
    assert proof["positions"] > 500
    assert "KL " in (made.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "outtype"), [*(("llama", name) for name in QUANTISED), ("qwen3", "q4_k_m")]
)
def test_engine_quantises_what_was_proven(
    family: str, outtype: str, converted: Make, tmp_path: Path
) -> None:
    made = export(converted(family), "gguf", tmp_path / "x", outtype=outtype, proven=True)
    file = file_of(made.path)
    assert file.name.endswith(f"-{outtype.upper()}.gguf")
    kinds = {t.kind for name, t in read_gguf_header(file).tensors.items() if "ffn" in name}
    assert kinds & {"Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
    record = json.loads((made.path / RECORD).read_text())
    assert record["outtype"] == outtype.upper()
    assert 0 < record["proof"]["divergence"] <= record["proof"]["bound"]
    assert set(record["files"]) == {path.name for path in made.path.iterdir()} - {RECORD}


def test_engine_is_not_believed_when_it_quantises(
    converted: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted("llama")
    other = file_of(export(converted("llama", seed=1), "gguf", tmp_path / "other").path)
    plain = gguf_quantised.quantise_file
    monkeypatch.setattr(
        gguf_quantised, "quantise_file", lambda path, out, number: plain(other, out, number)
    )
    with pytest.raises(dc.DataError, match="quantiser made another model"):
        export(folder, "gguf", tmp_path / "x", outtype="q4_k_m")
    assert not (tmp_path / "x").exists()


HOW: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 2.0},
    "drawn": {"temperature": 1.0, "seed": 5, "top_k": 40},
    "in few steps": {"max_denoising_steps": 2, "unmasking": "entropy"},
}
"""More ways are tried without an engine, in test_gguf_readers.py."""


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("target", "shift"), [("bd3lm", "keep"), ("bd3lm", "drop"), ("mdlm", "keep")]
)
def test_engine_decodes_prompts_of_all_lengths_together(
    target: str, shift: str, how: str, converted: Make, tmp_path: Path
) -> None:
    """Rows end, and leave, at different steps; prompts have masks in them."""
    folder = converted("llama", target=target, shift=shift)
    model, _ = dc.load(folder, device="cpu", dtype="float32")
    made = export(folder, "gguf", tmp_path / "x", outtype="f32")
    theirs = load_gguf(file_of(made.path), 1).model
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 380, (4, 11), generator=draw)
    ids[1, 4] = ids[2, 9] = model.config.mask_token_id
    seen = torch.tensor([[1] * 11, [1] * 8 + [0] * 3, [0] * 1 + [1] * 10, [1] * 3 + [0] * 8])
    settings = {
        "attention_mask": seen,
        "max_new_tokens": 10,
        "eos_token_id": list(range(30)),  # some rows end early
        "return_dict_in_generate": True,
        **HOW[how],
    }
    ours, other = model.generate(ids, **settings), theirs.generate(ids, **settings)
    assert torch.equal(ours.sequences, other.sequences)
    if target == "mdlm":
        assert ours.forwards == other.forwards


def test_engine_decodes_a_model_without_masks(converted: Make, tmp_path: Path) -> None:
    folder = converted(
        "qwen3", target="mdlm", shift="drop",
        recipe={"noise": {"kernel": "uniform", "discrete_steps": 8}},
    )  # fmt: skip
    made = export(folder, "gguf", tmp_path / "x", outtype="f32")
    model, _ = dc.load(folder, device="cpu", dtype="float32")
    theirs = load_gguf(file_of(made.path), 1).model
    ids = torch.tensor([[5, 9, 77]])
    for seed in (1, 2):
        one, other = (m.generate(ids, max_new_tokens=8, seed=seed) for m in (model, theirs))
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        ["--prompt", "A list is"],
        ["--prompt", "A list ___ a value", "--infill", "___"],
        ["--prompt", "Hello", "--chat", "--threshold", "0.3"],
        ["--prompt", "A list is", "--prompt", "def f(x):"],
    ],
)
def test_engine_is_asked_as_a_folder_is(
    options: list[str], converted: Make, tmp_path: Path
) -> None:
    folder = converted("llama")
    file = file_of(export(folder, "gguf", tmp_path / "x", outtype="f32").path)
    line = [*options, "--max-new-tokens", "12", "--json"]
    ours = CliRunner().invoke(app, ["sample", str(folder), *line])
    theirs = CliRunner().invoke(app, ["sample", str(file), "--threads", "1", *line])
    assert theirs.exit_code == 0, theirs.stderr
    one, other = json.loads(ours.stdout), json.loads(theirs.stdout)
    for first, second in zip(
        *(x if isinstance(x, list) else [x] for x in (one, other)), strict=True
    ):
        assert first["text"] == second["text"]
        assert first["prompt"] == second["prompt"]
    written = dc.sample(str(file), "A list is", max_new_tokens=4, threads=1)
    assert written.new_tokens == 4


def test_engine_films_what_it_writes(converted: Make, tmp_path: Path) -> None:
    file = file_of(export(converted("llama"), "gguf", tmp_path / "x", outtype="f32").path)
    film = tmp_path / "film.html"
    line = ["sample", str(file), "--max-new-tokens", "6", "--record", str(film), "--watch"]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert film.stat().st_size > 1000


def test_engine_says_what_it_cannot_do(converted: Make, tmp_path: Path) -> None:
    file = file_of(export(converted("llama", target="mdlm"), "gguf", tmp_path / "x").path)
    line = ["sample", str(file), "--block-length", "4", "--approximate-cache"]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 2
    assert "--approximate-cache" in shown.stderr
    with pytest.raises(dc.RequestError, match="at its end only"):
        dc.sample(file, "A list is", block_length=4, approximate_cache=True)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 4096)
    with pytest.raises(dc.DataError):
        dc.sample(file, "A list is")


def _declared(change: Callable[[layout.GgufLayout], layout.GgufLayout]) -> Callable[..., None]:
    """Return a fault in what is declared: writer and byte proof both believe it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = gguf_export.describe

        def faulty(given: layout.GgufLayout, *args: Any) -> Any:
            return plain(change(given), *args)

        patch.setattr(gguf_export, "describe", faulty)

    return plant


def _keys(**changed: Any) -> Callable[..., None]:
    """Return a fault in the metadata, which whoever reads the file believes as well."""
    names = {name.replace("__", "."): value for name, value in changed.items()}

    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = layout.model_keys

        def keys(graph: str, converted: Any) -> dict[str, Any]:
            found = {**plain(graph, converted), **names}
            return {key: value for key, value in found.items() if value is not None}

        patch.setattr(layout, "model_keys", keys)

    return plant


def _tensors(source: Callable[[str, Mapping[str, Any]], Any]) -> Callable[..., None]:
    """Return a fault in which tensor goes where."""

    def change(given: layout.GgufLayout) -> layout.GgufLayout:
        def tensors(converted: Any) -> tuple[layout.Stored, ...]:
            plain = {stored.name: stored for stored in given.tensors(converted)}
            return tuple(
                dataclasses.replace(stored, source=plain[source(name, plain)].source)
                for name, stored in plain.items()
            )

        return dataclasses.replace(given, tensors=tensors)

    return _declared(change)


def _swapped(one: str, other: str) -> Callable[[str, Mapping[str, Any]], str]:
    def source(name: str, plain: Mapping[str, Any]) -> str:
        if one in name:
            return name.replace(one, other)
        return name.replace(other, one) if other in name else name

    return source


def _tokens(**changed: Any) -> Callable[..., None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = gguf_export.tokenizer_keys
        names = {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
        patch.setattr(gguf_export, "tokenizer_keys", lambda *a, **k: {**plain(*a, **k), **names})

    return plant


def _merges_reversed(patch: pytest.MonkeyPatch) -> None:
    plain = gguf_tokens._merges
    patch.setattr(gguf_tokens, "_merges", lambda model: reversed(list(plain(model))))


def _driver(**changed: Any) -> Callable[..., None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for name, value in changed.items():
            patch.setattr(LlamaCache, name, value)

    return plant


RUN = LlamaCache.run
SAME_SIZE = {"num_key_value_heads": 4}
FAULTS: dict[str, tuple[Callable[[Make], Path], Callable[..., None]]] = {
    "permutation forgotten": (
        lambda make: make("llama"),
        lambda patch: patch.setattr(layout, "_IN_PAIRS", frozenset()),
    ),
    "permutation where there is none": (
        lambda make: make("qwen2"),
        lambda patch: patch.setattr(layout, "_IN_PAIRS", frozenset({"qwen2"})),
    ),
    "shift key absent": (lambda make: make("llama"), _keys(diffusion__shift_logits=None)),
    "shift key wrong": (
        lambda make: make("llama", shift="drop"),
        _keys(diffusion__shift_logits=True),
    ),
    "causal flag true": (lambda make: make("llama"), _keys(llama__attention__causal=True)),
    "blocks of another size": (lambda make: make("llama"), _keys(diffusion__block_size=8)),
    "wrong eps": (
        lambda make: make("qwen3"),
        _keys(qwen3__attention__layer_norm_rms_epsilon=1e-2),
    ),
    "wrong base of rotary frequencies": (
        lambda make: make("mistral"),
        _keys(llama__rope__freq_base=5e5),
    ),
    "scaling of positions dropped": (
        lambda make: with_rope(make("qwen2"), rope_type="linear", factor=4.0),
        _keys(qwen2__rope__scaling__type=None, qwen2__rope__scaling__factor=None),
    ),
    "factors of Llama 3 dropped": (
        lambda make: with_rope(make("llama"), **LLAMA3),
        lambda patch: patch.setattr(layout, "llama3_factors", lambda rope, width, old: (1.0,) * 4),
    ),
    "queries and keys swapped": (
        lambda make: make("llama", **SAME_SIZE),
        _tensors(_swapped(".attn_q.", ".attn_k.")),
    ),
    "keys and values swapped": (
        lambda make: make("qwen3"),
        _tensors(_swapped(".attn_k.", ".attn_v.")),
    ),
    "one layer shifted": (lambda make: make("qwen3"), _tensors(_swapped("blk.0.", "blk.1."))),
    "gate and up swapped": (
        lambda make: make("llama"),
        _tensors(_swapped(".ffn_gate.", ".ffn_up.")),
    ),
    "another mask": (lambda make: make("llama"), _tokens(mask_token_id=7)),
    "merges in another order": (lambda make: make("qwen2"), _merges_reversed),
    "text without its beginning": (lambda make: make("llama"), _tokens(add_bos_token=False)),
    "blocks read causally": (
        lambda make: make("llama"),
        _driver(run=lambda self, *args, **how: RUN(self, *args, **how | {"causal": True})),
    ),
    "noise stays in the cache": (
        lambda make: make("llama"),
        _driver(forget=lambda self, row, first: None),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_engine_finds_a_fault_that_the_bytes_do_not_show(
    fault: str, converted: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, plant = FAULTS[fault]
    folder = make(converted)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(DllmConvertError):
            export(folder, "gguf", tmp_path / "out", outtype="f32", proven=True)
    assert not list(tmp_path.iterdir())


DIFFUSION = {"llama": "llada", "mistral": "llada", "qwen2": "dream", "qwen3": "rnd1"}


@pytest.fixture
def anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let masks be as likely as they are: nobody trained these models."""
    for bound in ("MASK_BOUND", "ROWS_BOUND"):
        monkeypatch.setattr(dangers, bound, 1.0)


@pytest.mark.usefixtures("anything_goes")
@pytest.mark.parametrize("shift", ["keep", "drop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_reads_a_diffusion_architecture_of_its_own(
    family: str, shift: str, converted: Make, tmp_path: Path
) -> None:
    folder = converted(family, target="mdlm", shift=shift)
    made = export(folder, "gguf-diffusion", tmp_path / "x", outtype="f32", proven=True)
    assert any("189 of 189" in found for found in made.checked.values())
    header = read_gguf_header(file_of(made.path))
    assert header.metadata["general.architecture"] == DIFFUSION[family]
    assert header.metadata["diffusion.shift_logits"] is (shift == "keep")
    assert "bound" in made.checked["mask"]
    assert "llama-diffusion-cli -m" in made.launch[0]
    assert dc.sample(file_of(made.path), "A list is", max_new_tokens=4, threads=1).new_tokens == 4


@pytest.mark.usefixtures("anything_goes")
@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_engine_reads_an_expert_of_fewer_bits(
    outtype: str, converted: Make, tmp_path: Path
) -> None:
    folder = converted("qwen3", target="mdlm")
    made = export(folder, "gguf-diffusion", tmp_path / "x", outtype=outtype, proven=True)
    kinds = {name: t.kind for name, t in read_gguf_header(file_of(made.path)).tensors.items()}
    assert kinds["blk.0.ffn_up_exps.weight"] == outtype.upper()
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"


def test_what_a_diffusion_architecture_has_not_is_refused(converted: Make, tmp_path: Path) -> None:
    for folder, reason in (
        (converted("llama"), "it is bd3lm, and llama-diffusion-cli lets every token see"),
        (
            with_rope(converted("llama", target="mdlm"), **LLAMA3),
            "type llama3, which llama.cpp does not turn in a llada graph",
        ),
        (converted("llama", target="mdlm", attention_bias=True), r"llama adds none"),
        (converted("llama", target="mdlm"), "the mask itself a probability of"),
        (
            converted(
                "llama", target="mdlm", shift="drop",
                recipe={"noise": {"kernel": "uniform", "discrete_steps": 8}},
            ),
            "only fill masks in",
        ),
    ):  # fmt: skip
        with pytest.raises(dc.IncompatibleError, match=reason) as caught:
            export(folder, "gguf-diffusion", tmp_path / "x")
        assert caught.value.hint
        assert not list(tmp_path.iterdir())


def test_engine_is_timed_beside_ours(converted: Make, tmp_path: Path) -> None:
    folder = converted("llama", block=32)
    file = file_of(export(folder, "gguf", tmp_path / "x", outtype="f32").path)
    row = engines.compare(folder, [file], new=8, steps=2, pairs=2)[file.name]
    assert row["equal_tokens"] == row["of"]
    for kind in ("wall", "processor"):
        assert 0 < row[kind]["least"] <= row[kind]["ratio"] <= row[kind]["largest"]
