"""What headers, configs and tokenizer files tell, against what the libraries say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import factory
import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning.conversion import make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.materialise import materialise
from dllm_convert.source.safetensors_header import read_checkpoint

Sources = Callable[..., Path]
QUIET = Reporter(quiet=True)
FAMILIES = tuple(factory.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_what_safetensors_reads(
    source_cache: Sources, family: str, shards: int
) -> None:
    path = source_cache(family, shards=shards, dtype=torch.bfloat16)
    info = inspect_source(str(path))
    assert (info.kind, info.path, info.model_type) == ("folder", path, family)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == shards
    stored = {name: (file.name, t) for file in files for name, t in load_file(file).items()}
    assert info.tensors.keys() == stored.keys()
    for name, (file, tensor) in stored.items():
        assert info.tensors[name].shape == tuple(tensor.shape)
        assert (info.tensors[name].dtype, info.tensors[name].file) == ("BF16", file)
    assert info.parameters == sum(tensor.numel() for _, tensor in stored.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_is_what_transformers_loads(source_cache: Sources, family: str) -> None:
    path = source_cache(family)
    info, loaded = (
        inspect_source(str(path)).tokenizer,
        transformers.AutoTokenizer.from_pretrained(path),
    )
    assert dict(info.vocab) == loaded.get_vocab()
    assert info.size == len(loaded)
    assert info.mask_token == loaded.mask_token
    for role in ("bos", "eos", "pad", "unk", "cls", "sep"):
        row = json.loads((path / "tokenizer_config.json").read_text()).get(f"{role}_token")
        assert row is None or info.vocab[row] in info.reachable


def test_a_chat_template_makes_its_tokens_reachable(source_cache: Sources) -> None:
    tokenizer = inspect_source(str(source_cache("llama"))).tokenizer
    assert tokenizer.vocab["<|start|>"] in tokenizer.reachable
    plain = inspect_source(str(source_cache("qwen3"))).tokenizer
    assert plain.vocab["<|im_start|>"] not in plain.reachable


def test_a_generation_configs_ids_are_reachable(source_factory: Sources) -> None:
    path = source_factory("qwen3")
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "mask_token_id": 9}')
    assert {1, 2} <= inspect_source(str(path)).tokenizer.reachable
    assert 9 not in inspect_source(str(path)).tokenizer.reachable


def test_vocab_txt_alone(source_factory: Sources) -> None:
    path = source_factory("bert")
    vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    (path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)) + "\n")
    info = inspect_source(str(path)).tokenizer
    assert dict(info.vocab) == vocab
    assert info.mask_token == "[MASK]"


def test_vocab_json_alone(source_factory: Sources) -> None:
    path = source_factory("roberta")
    vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    (path / "vocab.json").write_text(json.dumps(vocab))
    assert inspect_source(str(path)).tokenizer.mask_token == "<mask>"


def test_a_sentencepiece_model_alone(source_factory: Sources) -> None:
    def field(number: int, wire: int, payload: bytes) -> bytes:
        return bytes([number << 3 | wire]) + payload

    def piece(text: str, kind: int) -> bytes:
        raw = text.encode()
        inner = field(1, 2, bytes([len(raw)]) + raw) + field(2, 5, b"\0\0\0\0")
        inner += field(3, 0, bytes([kind]))
        return field(1, 2, bytes([len(inner)]) + inner)

    path = source_factory("mistral")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    pieces = [("<unk>", 2), ("<s>", 3), ("[control_8]", 3), ("▁a", 1), ("<0x0A>", 6)]
    # A trainer's settings with eos_id -1: the vocabulary has no token that ends a text.
    no_end = b"\xd0\x02" + b"\xff" * 9 + b"\x01"
    model = b"".join(piece(*entry) for entry in pieces)
    model += field(2, 2, bytes([len(no_end)]) + no_end)
    (path / "tokenizer.model").write_bytes(model)
    info = inspect_source(str(path)).tokenizer
    assert dict(info.vocab) == {text: row for row, (text, _) in enumerate(pieces)}
    assert info.special == {"<unk>", "<s>", "[control_8]"}


def test_the_licence_of_the_card(source_factory: Sources) -> None:
    path = source_factory("llama")
    assert inspect_source(str(path)).license is None
    (path / "README.md").write_text("---\nlanguage: en\nlicense: llama3.2\ntags: [a]\n---\n# Hi\n")
    assert inspect_source(str(path)).license == "llama3.2"
    (path / "README.md").write_text("# Hi\nlicense: mit\n")
    assert inspect_source(str(path)).license is None


def test_the_fingerprint_follows_the_files(source_factory: Sources) -> None:
    path = source_factory("llama")
    before = inspect_source(str(path)).fingerprint
    assert before == inspect_source(str(path)).fingerprint
    (path / "config.json").write_text((path / "config.json").read_text() + "\n")
    assert before != inspect_source(str(path)).fingerprint


def test_a_plan_of_a_folder_takes_no_time(source_cache: Sources) -> None:
    from dllm_convert.planning.conversion import make_plan

    path = source_cache("llama", shards=2)
    started = time.perf_counter()
    make_plan(Recipe(source=str(path), target="mdlm"), inspect_source(str(path)))
    assert time.perf_counter() - started < 0.5


class TestPickle:
    """pytorch_model.bin: read with weights_only, converted once."""

    @pytest.fixture
    def folder(self, source_factory: Sources) -> Path:
        path = source_factory("bert")
        state = load_file(path / "model.safetensors")
        embedding = state["bert.embeddings.word_embeddings.weight"]
        state["cls.predictions.decoder.weight"] = embedding
        state["bert.embeddings.position_ids"] = torch.arange(8)
        torch.save(state, path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
        return path

    def test_it_has_to_be_asked_for(self, folder: Path) -> None:
        info = inspect_source(str(folder))
        with pytest.raises(IncompatibleError, match="--allow-pickle") as caught:
            make_plan(Recipe(source="x", target="mdlm"), info)
        assert caught.value.exit_code == 3
        assert make_plan(Recipe(source="x", target="mdlm", allow_pickle=True), info).warnings

    @pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
    def test_shard_by_shard_into_safetensors(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
    ) -> None:
        monkeypatch.setenv("DLLM_CONVERT_CACHE", str(tmp_path / "cache"))
        state = torch.load(folder / "pytorch_model.bin")
        state["bert.encoder.layer.0.output.dense.weight"] = torch.randn(64, 32).bfloat16().T
        names = sorted(state)
        weight_map = {}
        for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            file = f"pytorch_model-{number:05d}-of-00002.bin"
            part_state = {name: state[name] for name in part}
            torch.save(part_state, folder / file, _use_new_zipfile_serialization=not old)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (folder / "pytorch_model.bin").unlink()
        source = materialise(inspect_source(str(folder)), QUIET)
        assert {*weight_map.values(), "config.json"} <= source.originals.keys()
        headers = read_checkpoint(source.folder)
        assert len(headers) == 2
        found = {}
        for file in headers:
            found |= load_file(source.folder / file)
        assert all(torch.equal(found[name], state[name]) for name in found)
        assert found["bert.encoder.layer.0.output.dense.weight"].dtype == torch.bfloat16
        assert set(state) - set(found) <= {
            "bert.embeddings.position_ids",
            "cls.predictions.decoder.weight",
        }

    def test_the_plan_warns_and_knows_no_tensors(self, folder: Path) -> None:
        info = inspect_source(str(folder))
        assert dict(info.tensors) == {}
        assert "weights_only=True" in info.warnings[0]
        assert "pytorch_model.bin" in info.files

    def test_it_becomes_safetensors_once(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DLLM_CONVERT_CACHE", str(tmp_path / "cache"))
        made = materialise(inspect_source(str(folder)), QUIET).folder
        assert made.is_relative_to(tmp_path / "cache")
        names = set(load_file(made / "model.safetensors"))
        assert "bert.embeddings.word_embeddings.weight" in names
        assert not names & {"cls.predictions.decoder.weight", "bert.embeddings.position_ids"}
        assert (made / "tokenizer.json").is_file()
        stamp = (made / "model.safetensors").stat().st_mtime_ns
        assert materialise(inspect_source(str(folder)), QUIET).folder == made
        assert (made / "model.safetensors").stat().st_mtime_ns == stamp
        assert [p.name for p in made.parent.iterdir()] == [made.name]
        _, info = transformers.BertForMaskedLM.from_pretrained(made, output_loading_info=True)
        assert not any(info.values())

    def test_code_in_a_pickle_is_not_run(self, folder: Path, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return Path.touch, (str(tmp_path / "boom"),)

        torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
        with pytest.raises(DataError, match=r"pytorch_model\.bin"):
            materialise(inspect_source(str(folder)), QUIET)
        assert not (tmp_path / "boom").exists()

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04broken"])
    def test_a_broken_pickle(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
    ) -> None:
        monkeypatch.setenv("DLLM_CONVERT_CACHE", str(tmp_path / "cache"))
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"pytorch_model\.bin"):
            materialise(inspect_source(str(folder)), QUIET)
        assert list((tmp_path / "cache" / "pickle").iterdir()) == []


class TestGguf:
    """GGUF headers, against what the gguf package writes."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_license("mit")
        writer.add_context_length(256)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "</s>", "<spare>", "a"])
        writer.add_token_types([3, 3, 3, 1])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("<s>{{ messages }}")
        layer = ("attn_norm", "attn_q", "ffn_up")
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float16))
        for name in layer:
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros((8, 32), dtype=np.float32))
        quantised = gguf.quants.quantize(
            np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_0
        )
        writer.add_tensor("output.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def test_header(self, file: Path) -> None:
        info = inspect_source(str(file))
        assert (info.kind, info.model_type, info.license) == ("gguf", "llama", "mit")
        assert info.config["max_position_embeddings"] == 256
        assert info.config["tie_word_embeddings"] is False
        assert info.tensors["model.embed_tokens.weight"].shape == (4, 32)
        assert info.tensors["model.embed_tokens.weight"].dtype == "F16"
        assert info.tensors["lm_head.weight"].dtype == "Q4_0"
        assert info.tensors["lm_head.weight"].shape == (2, 64)
        assert "model.layers.0.self_attn.q_proj.weight" in info.tensors
        assert info.tokenizer.vocab == {"<s>": 0, "</s>": 1, "<spare>": 2, "a": 3}
        assert info.tokenizer.special == {"<s>", "</s>", "<spare>"}
        assert info.tokenizer.reachable == {0, 1}
        assert "quantised (Q4_0)" in info.warnings[0]

    def test_every_truncation_is_noticed(self, file: Path, tmp_path: Path) -> None:
        whole = file.read_bytes()
        broken = tmp_path / "broken.gguf"
        for length in [*range(0, len(whole) - 32, 37), len(whole) - 33]:
            broken.write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"broken\.gguf"):
                inspect_source(str(broken))

    def test_random_damage_gives_known_errors_only(self, file: Path, tmp_path: Path) -> None:
        whole = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        random = np.random.default_rng(0)
        broken = tmp_path / "broken.gguf"
        for _ in range(200):
            damaged = whole.copy()
            damaged[random.integers(0, 700, 4)] = random.integers(0, 256, 4)
            broken.write_bytes(damaged.tobytes())
            try:
                inspect_source(str(broken))
            except DataError as error:
                assert "broken.gguf" in str(error)

    def test_all_types_agree_with_ggml(self) -> None:
        from dllm_convert.source.gguf_header import GGML_TYPES

        for number, (name, elements, size) in GGML_TYPES.items():
            kind = gguf.GGMLQuantizationType(number)
            assert kind.name == name
            assert gguf.GGML_QUANT_SIZES[kind] == (elements, size)
