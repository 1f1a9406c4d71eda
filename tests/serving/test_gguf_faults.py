"""Faults in a GGUF file that reading it back finds, without llama.cpp."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from gguf_cases import Make, file_of, maker

from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning.layouts.gguf import Stored
from dllm_convert.serving import gguf_export
from dllm_convert.serving.gguf_model import load_gguf
from dllm_convert.serving.run import export
from dllm_convert.source.gguf_header import read_gguf_header, tensor_bytes

Tensors = tuple[Stored, ...]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory) -> Make:
    """Return a maker of tiny conversions, each made once."""
    return maker(tmp_path_factory.mktemp("converted"), source_cache)


def each(change: Callable[[Stored, Mapping[str, Stored]], Stored]) -> Callable[[Tensors], Tensors]:
    """Return a change of every tensor that the writer is told of."""

    def changed(tensors: Tensors) -> Tensors:
        plain = {stored.name: stored for stored in tensors}
        return tuple(change(stored, plain) for stored in tensors)

    return changed


def swapped(one: str, other: str) -> Callable[[Tensors], Tensors]:
    """Return a change that puts two tensors, or two layers, in each other's place."""

    def change(stored: Stored, plain: Mapping[str, Stored]) -> Stored:
        name = stored.name
        there = name.replace(one, other) if one in name else name.replace(other, one)
        return dataclasses.replace(stored, source=plain.get(there, stored).source)

    return each(change)


WRITTEN: dict[str, Callable[[Tensors], Tensors]] = {
    "permutation forgotten": each(lambda s, _: dataclasses.replace(s, heads=0)),
    "permutation by other heads": each(
        lambda s, _: dataclasses.replace(s, heads=1 if s.heads else 0)
    ),
    "permutation where there is none": each(
        lambda s, _: dataclasses.replace(s, heads=4 if "attn_output" in s.name else s.heads)
    ),
    "queries and keys swapped": swapped(".attn_q.", ".attn_k."),
    "keys and values swapped": swapped(".attn_k.", ".attn_v."),
    "gate and up swapped": swapped(".ffn_gate.", ".ffn_up."),
    "norms swapped": swapped(".attn_norm.", ".ffn_norm."),
    "one layer shifted": swapped("blk.0.", "blk.1."),
    "head and embedding swapped": swapped("token_embd.weight", "output.weight"),
    "a tensor missing": lambda tensors: tensors[1:],
    "a tensor too many": lambda tensors: (*tensors, Stored("extra", None, (4,), exact=True)),
}


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("fault", WRITTEN)
def test_a_fault_of_the_writer_is_found(
    fault: str, outtype: str, converted: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = converted("llama", num_key_value_heads=4), gguf_export.write_gguf

    def faulty(path: Path, graph: str, keys: Any, tensors: Tensors, kinds: Any, *rest: Any) -> None:
        plain(path, graph, keys, WRITTEN[fault](tensors), {**kinds, "extra": "F32"}, *rest)

    monkeypatch.setattr(gguf_export, "write_gguf", faulty)
    with pytest.raises(DataError, match="the export is not its source"):
        export(folder, "gguf", tmp_path / "out", outtype=outtype)
    assert not list(tmp_path.iterdir())


KEYS: dict[str, Any] = {
    "diffusion.shift_logits": None,
    "llama.attention.causal": True,
    "llama.attention.layer_norm_rms_epsilon": 1e-4,
    "llama.rope.freq_base": 5e5,
    "llama.attention.head_count": 2,
    "diffusion.block_size": 8,
    "tokenizer.ggml.mask_token_id": 3,
    "tokenizer.ggml.pre": "smollm",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_was_lost_or_changed_is_found(
    key: str, converted: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, folder = gguf_export.write_gguf, converted("llama")

    def faulty(path: Path, graph: str, keys: Mapping[str, Any], *rest: Any) -> None:
        changed = {**keys, key: KEYS[key]}
        written = {name: value for name, value in changed.items() if value is not None}
        plain(path, graph, written, *rest)

    monkeypatch.setattr(gguf_export, "write_gguf", faulty)
    with pytest.raises(DataError, match=key):
        export(folder, "gguf", tmp_path / "out")
    # Who is given such a file says so too, before llama.cpp sees it.
    monkeypatch.setattr(gguf_export, "prove_gguf", lambda *given: 0)
    file = file_of(export(folder, "gguf", tmp_path / "out").path)
    if key != "tokenizer.ggml.pre":
        with pytest.raises(IncompatibleError, match=key):
            load_gguf(file)


PLACES = {
    "the first number": lambda start, size: start,
    "the last number": lambda start, size: start + size - 2,
    "the mask's row": lambda start, size: start + 384 * (size // 448) + 5,
}


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("place", PLACES)
def test_a_byte_that_rotted_is_found(
    place: str, outtype: str, converted: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gguf_export.write_gguf

    def faulty(path: Path, *rest: Any) -> None:
        plain(path, *rest)
        tensor = read_gguf_header(path).tensors["token_embd.weight"]
        at = PLACES[place](tensor.start, tensor_bytes(tensor.kind, tensor.shape))
        with path.open("r+b") as file:
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 16]), at)

    monkeypatch.setattr(gguf_export, "write_gguf", faulty)
    with pytest.raises(DataError, match=r"token_embd\.weight does not hold the rows"):
        export(converted("llama"), "gguf", tmp_path / "out", outtype=outtype)


def test_files_of_somebody_else_are_not_decoded(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(IncompatibleError, match="does not carry the files of a conversion"):
        load_gguf(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError):
        load_gguf(tmp_path / "b.gguf")
