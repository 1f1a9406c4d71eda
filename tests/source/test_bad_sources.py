"""Sources that are broken, incomplete or not checkpoints: a known error that names the file."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.errors import DataError, DllmConvertError, UnknownSourceError, UnsupportedError
from dllm_convert.planning.conversion import make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.safetensors_header import read_header

Sources = Callable[..., Path]


def refuse(path: Path | str, *words: str) -> DllmConvertError:
    """Inspect `path`, expect a DataError on one line that has all `words`, and return it."""
    with pytest.raises(DataError) as caught:
        inspect_source(str(path))
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    is_typed = isinstance(caught.value, UnknownSourceError)
    assert caught.value.exit_code == (2 if is_typed else 1)
    return caught.value


def write_safetensors(
    path: Path, header: Any, data: bytes = b"", length: int | None = None
) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class TestPlaces:
    """What is no source at all."""

    @pytest.mark.parametrize("path", ["./absent", "/absent/folder", "~/absent", "absent.gguf"])
    def test_a_path_that_does_not_exist(self, path: str) -> None:
        refuse(path, "does not exist", "recipe name")

    @pytest.mark.parametrize("text", ["", "a/b/c", "has space/x", "a//b", "qwen:latest"])
    def test_text_that_is_no_hub_id(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir("/")
        if text:
            refuse(text, "not a Hub id")

    def test_a_file_that_is_no_gguf(self, source_cache: Sources) -> None:
        refuse(source_cache("llama") / "config.json", "expected a folder")
        error = refuse(source_cache("llama") / "model.safetensors", "expected a folder")
        assert "folder that holds it" in str(error.hint)

    def test_a_revision_of_a_folder(self, source_cache: Sources) -> None:
        with pytest.raises(DataError, match="no revision"):
            inspect_source(str(source_cache("llama")), revision="main")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        refuse(tmp_path, "no config.json", str(tmp_path))

    @pytest.mark.parametrize(
        ("inside", "hint"),
        [
            ("model.Q4_0.gguf", "one of its .gguf files"),
            ("adapter_config.json", "merge it into its base"),
            ("consolidated.00.pth", "take the transformers version"),
            ("final/config.json", "Did you mean {}/final?"),
            ("snapshots/0123/config.json", "Did you mean {}/snapshots/0123?"),
        ],
    )
    def test_a_folder_of_something_else(self, tmp_path: Path, inside: str, hint: str) -> None:
        (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / inside).touch()
        refuse(tmp_path, "no config.json", hint.format(tmp_path))


class TestConfig:
    """config.json."""

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
    def test_no_json(self, source_factory: Sources, content: bytes) -> None:
        path = source_factory("llama")
        (path / "config.json").write_bytes(content)
        refuse(path, "config.json", "not valid JSON")

    @pytest.mark.parametrize("content", ["[]", "3", "null"])
    def test_no_object(self, source_factory: Sources, content: str) -> None:
        path = source_factory("llama")
        (path / "config.json").write_text(content)
        refuse(path, "config.json", "expected an object")

    @pytest.mark.parametrize("content", ["{}", '{"model_type": null}', '{"model_type": 3}'])
    def test_no_model_type(self, source_factory: Sources, content: str) -> None:
        path = source_factory("llama")
        (path / "config.json").write_text(content)
        refuse(path, "model_type", "expected a family's name")

    @pytest.mark.parametrize("layers", [None, 0, -1, "two", True])
    def test_numbers_that_are_none(self, source_factory: Sources, layers: object) -> None:
        path = source_factory("llama")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with pytest.raises(DllmConvertError, match="num_hidden_layers"):
            make_plan(Recipe(source="x", target="mdlm"), inspect_source(str(path)))

    def test_unsupported_family(self, source_factory: Sources) -> None:
        path = source_factory("llama")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
        with pytest.raises(
            UnsupportedError, match="adapters exist for bert, llama, mistral"
        ) as caught:
            make_plan(Recipe(source="x", target="mdlm"), inspect_source(str(path)))
        assert caught.value.exit_code == 3


class TestHeaders:
    """model.safetensors."""

    @pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.99999])
    def test_truncated(self, source_factory: Sources, share: float) -> None:
        path = source_factory("llama")
        file = path / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        refuse(path, "model.safetensors", "expected", "Download the file again")

    def test_bytes_after_the_end(self, source_factory: Sources) -> None:
        path = source_factory("llama")
        with (path / "model.safetensors").open("ab") as handle:
            handle.write(b"more")
        refuse(path, "model.safetensors", "bytes of data")

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 100])
    def test_absurd_header_length(self, source_factory: Sources, length: int) -> None:
        path = source_factory("llama")
        write_safetensors(path / "model.safetensors", {}, length=length)
        refuse(path, "model.safetensors", f"a header of {length} bytes")

    @pytest.mark.parametrize(
        ("header", "data", "words"),
        [
            (b"not json", b"", "not valid JSON"),
            (b"\xff\xff", b"", "not valid JSON"),
            (b"[" * 50_000, b"", "not valid JSON"),
            ([], b"", "not an object"),
            ({"a": 3}, b"", "dtype, shape, data_offsets"),
            ({"a": {"dtype": "F32"}}, b"", "dtype, shape, data_offsets"),
            ({"a": entry(dtype="F33")}, b"\0" * 8, "has dtype 'F33'"),
            ({"a": entry(dtype=["F32"])}, b"\0" * 8, "has dtype"),
            ({"a": entry(shape=(-2,))}, b"\0" * 8, "has shape"),
            ({"a": entry(shape=(True, 2))}, b"\0" * 8, "has shape"),
            ({"a": entry(shape="2")}, b"\0" * 8, "has shape"),
            ({"a": entry(offsets=(0,))}, b"\0" * 8, "has offsets"),
            ({"a": entry(offsets=(-8, 0))}, b"\0" * 8, "has offsets"),
            ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "lies at bytes 8..0"),
            ({"a": entry(offsets=(0, 2**70))}, b"\0" * 8, "lies at bytes"),
            ({"a": entry(shape=(3,))}, b"\0" * 8, "8 bytes, expected 12"),
            ({"a": entry(dtype="F16")}, b"\0" * 8, "8 bytes, expected 4"),
            ({"a": entry(shape=(2**62, 2**62))}, b"\0" * 8, "8 bytes, expected"),
            ({"a": entry(), "b": entry()}, b"\0" * 8, "overlaps"),
            ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "overlaps"),
            ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "leaves a hole"),
            ({"a": entry()}, b"\0" * 12, "12 bytes of data"),
            ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
            ({"__metadata__": []}, b"", "__metadata__"),
            (
                b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
                b"\0" * 8,
                "names 'a' twice",
            ),
        ],
    )
    def test_corrupt(self, source_factory: Sources, header: Any, data: bytes, words: str) -> None:
        path = source_factory("llama")
        write_safetensors(path / "model.safetensors", header, data)
        refuse(path, "model.safetensors", words)

    def test_the_smallest_valid_file(self, tmp_path: Path) -> None:
        write_safetensors(
            tmp_path / "a", {"a": entry(), "e": entry(shape=[0], offsets=[8, 8])}, b"\0" * 8
        )
        assert list(read_header(tmp_path / "a").entries) == ["a", "e"]

    def test_random_damage_to_the_header_gives_known_errors_only(
        self, source_factory: Sources
    ) -> None:
        path = source_factory("llama")
        file = path / "model.safetensors"
        whole = file.read_bytes()
        dice = random.Random(0)
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[dice.randrange(0, 1500)] = dice.randrange(256)
            file.write_bytes(damaged)
            try:
                inspect_source(str(path))
            except DataError as error:
                assert "model.safetensors" in str(error)

    def test_no_weights(self, source_factory: Sources) -> None:
        path = source_factory("llama")
        (path / "model.safetensors").unlink()
        refuse(path, "no weights", "model.safetensors")

    def test_a_git_lfs_pointer(self, source_factory: Sources) -> None:
        path = source_factory("llama")
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        (path / "model.safetensors").write_text(pointer)
        refuse(path, "model.safetensors", "git-LFS pointer", "git lfs pull")


class TestShards:
    """model.safetensors.index.json and what it names."""

    @pytest.fixture
    def sharded(self, source_factory: Sources) -> Path:
        return source_factory("llama", shards=3)

    def edit(self, path: Path, **changes: Any) -> None:
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] |= changes
        file.write_text(json.dumps(index))

    def test_missing_shard(self, sharded: Path) -> None:
        (sharded / "model-00002-of-00003.safetensors").unlink()
        refuse(sharded, "3 shards, 1 of them missing", "model-00002-of-00003.safetensors")

    def test_index_that_names_a_missing_tensor(self, sharded: Path) -> None:
        self.edit(sharded, **{"model.nowhere": "model-00001-of-00003.safetensors"})
        refuse(sharded, "model-00001-of-00003.safetensors", "'model.nowhere'")

    def test_tensor_in_another_shard_than_the_index_says(self, sharded: Path) -> None:
        self.edit(sharded, **{"model.norm.weight": "model-00001-of-00003.safetensors"})
        refuse(sharded, "model.norm.weight")

    def test_tensor_that_is_not_in_the_index(self, sharded: Path) -> None:
        file = sharded / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        del index["weight_map"]["model.norm.weight"]
        file.write_text(json.dumps(index))
        refuse(sharded, "'model.norm.weight'", "does not place there")

    @pytest.mark.parametrize(
        "name", ["../x", "/etc/passwd", "sub/x", "..", ".", "", "a\\b", "a\0b", None, 3]
    )
    def test_shard_names_that_leave_the_folder(self, sharded: Path, name: Any) -> None:
        self.edit(sharded, **{"model.norm.weight": name})
        refuse(sharded, "model.safetensors.index.json", "model.norm.weight")

    @pytest.mark.parametrize(
        "content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[", "[]"]
    )
    def test_broken_index(self, sharded: Path, content: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(content)
        refuse(sharded, "model.safetensors.index.json")

    def test_one_truncated_shard_is_named(self, sharded: Path) -> None:
        file = sharded / "model-00003-of-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        refuse(sharded, file.name, "truncated")


class TestTokenizer:
    """Tokenizer files."""

    def test_missing(self, source_factory: Sources) -> None:
        path = source_factory("llama")
        (path / "tokenizer.json").unlink()
        refuse(path, "no tokenizer", "tokenizer.json", "tokenizer.model")

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "{}",
            '{"model": 3}',
            '{"model": {"vocab": 3}}',
            '{"model": {"vocab": [3]}}',
            '{"model": {"vocab": {"a": "b"}}}',
            '{"model": {"vocab": {}}, "added_tokens": [3]}',
            '{"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]}',
        ],
    )
    def test_broken_tokenizer_json(self, source_factory: Sources, content: str) -> None:
        path = source_factory("llama")
        (path / "tokenizer.json").write_text(content)
        refuse(path, "tokenizer.json")

    @pytest.mark.parametrize(
        "content", [b"", b"\x0a", b"\x0a\xff", b"version https://git-lfs", b"\x0f"]
    )
    def test_broken_sentencepiece(self, source_factory: Sources, content: bytes) -> None:
        path = source_factory("mistral")
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.model").write_bytes(content)
        refuse(path, "tokenizer.model")

    def test_binary_vocab_txt(self, source_factory: Sources) -> None:
        path = source_factory("bert")
        (path / "tokenizer.json").unlink()
        (path / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe\n")
        refuse(path, "vocab.txt", "UTF-8")

    def test_larger_than_the_embedding(self, source_factory: Sources) -> None:
        path = source_factory("llama")
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["extra"] = 384
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(
            DllmConvertError, match="ids up to 384, the embedding only 384"
        ) as caught:
            make_plan(Recipe(source="x", target="mdlm"), inspect_source(str(path)))
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"\0" * 64])
def test_broken_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refuse(tmp_path / "model.gguf", "model.gguf", "expected a complete GGUF file")
